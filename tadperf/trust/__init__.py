"""Decides which labels to trust: TAD's dual loop, and an audit of labels without distillation."""

from __future__ import annotations

from tadperf.trust.audit import audit
from tadperf.trust.evidence import audit_labels
from tadperf.trust.label_issues import find_label_issues
from tadperf.trust.loop import DualLoopResult, dual_loop
from tadperf.trust.metrics import compare_with_clean, round_metrics
from tadperf.trust.partition import Partition, partition
from tadperf.trust.quality import label_quality_scores
from tadperf.trust.state import VERDICTS, TrustedView, TrustState, as_given

__all__ = [
    "VERDICTS",
    "DualLoopResult",
    "Partition",
    "TrustState",
    "TrustedView",
    "as_given",
    "audit",
    "audit_labels",
    "compare_with_clean",
    "dual_loop",
    "find_label_issues",
    "label_quality_scores",
    "partition",
    "round_metrics",
]
