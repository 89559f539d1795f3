"""How well trust did, where the truth is known. Apart from the method, which never sees a clean label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tadperf.trust.state import RECALLED, RELABELLED, TRUSTED, TrustState


def round_metrics(rounds: Sequence[TrustState], clean: Tensor | None = None) -> list[dict[str, Any]]:
    """One record a round: its verdicts by given class, the view's share, and the figures of `measure`."""
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
    """Shares in [0, 1] against clean labels int64 [N]; NaN where there is nothing to take a share of.

    view_accuracy: of working labels in the view. coverage: of samples in it. precision, recall: of the trusted samples
    that are right, and of the right ones that are trusted. recalled_accuracy, relabel_accuracy: of those verdicts.
    issue_precision, issue_recall: of the labels held wrong. suggested_accuracy: of the suggestions for all samples.
    """
    right, inside = state.given == clean, state.trusted
    outer = state.verdict == TRUSTED
    return {
        "view_accuracy": _share((state.working == clean)[inside]),
        "coverage": _share(inside),
        "precision": _share(right[outer]),
        "recall": _share(outer[right]),
        "recalled_accuracy": _share(right[state.verdict == RECALLED]),
        "relabel_accuracy": _share((state.working == clean)[state.verdict == RELABELLED]),
        "issue_precision": _share(~right[state.issues]),
        "issue_recall": _share(state.issues[~right]),
        "suggested_accuracy": _share(state.suggested == clean),
    }


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())
