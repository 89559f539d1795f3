"""Which labels can be trusted: TAD's dual loop, and an audit of labels that works without any distillation."""

from __future__ import annotations

from tadperf.trust.audit import audit, find_label_issues
from tadperf.trust.loop import Outcome, dual_loop
from tadperf.trust.measure import growth, measure
from tadperf.trust.partition import Partition, partition
from tadperf.trust.state import VERDICTS, TrustState, View, as_given

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
