"""Measures trust against clean labels. The method is in other modules and never sees a clean label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike
from torch import Tensor

from tadperf.data.convert import as_tensor
from tadperf.data.dataset import describe_tensor
from tadperf.trust.state import RECALLED, RELABELLED, TRUSTED, TrustState


def round_metrics(rounds: Sequence[TrustState], clean: Tensor | None = None) -> list[dict[str, Any]]:
    """Returns one record per round: coverage, verdicts by given class and, with clean labels, `compare_with_clean`."""
    return [
        {
            "round": number,
            "coverage": float(state.trusted.float().mean()),
            "sizes": state.counts(),
            **({} if clean is None else compare_with_clean(state, clean)),
        }
        for number, state in enumerate(rounds, 1)
    ]


def compare_with_clean(state: TrustState, clean: Tensor | ArrayLike) -> dict[str, float]:
    """Compares the verdicts with clean labels, integers [N]. Returns shares in [0, 1]; a share of no samples is NaN.

    view_accuracy: right working labels in the view. coverage: samples in the view.
    precision: right labels among the samples with verdict trusted. recall: these samples among the right labels.
    recalled_accuracy, relabel_accuracy: right working labels with that verdict.
    issue_precision: wrong labels among the issues. issue_recall: issues among the wrong labels.
    suggested_accuracy: right suggestions.
    Raises ValueError if the number of labels differs.
    """
    clean = as_tensor("clean", clean)
    if clean.shape != state.given.shape:
        raise ValueError(f"clean: {describe_tensor(clean)}: must be integers {list(state.given.shape)}")
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
