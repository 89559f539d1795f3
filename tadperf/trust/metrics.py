"""Measures trust against clean labels. Kept apart from the method, which never sees a clean label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tadperf.trust.state import RECALLED, RELABELLED, TRUSTED, TrustState


def round_metrics(rounds: Sequence[TrustState], clean: Tensor | None = None) -> list[dict[str, Any]]:
    """One record per round: verdicts by given class, coverage and, given clean labels, `compare_with_clean`."""
    return [
        {
            "round": number,
            "coverage": float(state.trusted.float().mean()),
            "sizes": state.counts(),
            **({} if clean is None else compare_with_clean(state, clean)),
        }
        for number, state in enumerate(rounds, 1)
    ]


def compare_with_clean(state: TrustState, clean: Tensor) -> dict[str, float]:
    """Compares the verdicts with clean labels int64 [N]; shares in [0, 1], NaN for a share of no samples.

    view_accuracy: right working labels in the view. coverage: samples in the view.
    precision: right labels among the trusted samples. recall: trusted samples among the right labels.
    recalled_accuracy, relabel_accuracy: right working labels with that verdict.
    issue_precision, issue_recall: the same for suspected label errors. suggested_accuracy: right suggestions.
    """
    right, in_view = state.given == clean, state.trusted
    trusted = state.verdict == TRUSTED
    return {
        "view_accuracy": _share((state.working == clean)[in_view]),
        "coverage": _share(in_view),
        "precision": _share(right[trusted]),
        "recall": _share(trusted[right]),
        "recalled_accuracy": _share(right[state.verdict == RECALLED]),
        "relabel_accuracy": _share((state.working == clean)[state.verdict == RELABELLED]),
        "issue_precision": _share(~right[state.issues]),
        "issue_recall": _share(state.issues[~right]),
        "suggested_accuracy": _share(state.suggested == clean),
    }


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())
