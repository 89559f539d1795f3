"""Which labels can be trusted: TAD's dual loop, and an audit of labels that works without any distillation."""

from __future__ import annotations

__all__ = [
    "VERDICTS",
    "Outcome",
    "Partition",
    "TrustState",
    "View",
    "as_given",
    "audit",
    "dual_loop",
    "find_label_issues",
    "growth",
    "measure",
    "partition",
]
