"""The ladder of a run: what trust, selection, soft labels and distillation each add to the test accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tadperf.nets.students import summarise


def ladder(scores: Mapping[str, Sequence[float]], network: str) -> list[dict[str, Any]]:
    """Returns the rungs of the ladder from the test accuracies by row, the lowest first (tadperf).

    given: random images, labels as given. trusted: random confirmed images. selected: the images that distillation
    starts from, with hard labels. labelled: the same images with soft labels, if the run has any. distilled: the
    distilled set. all: all trusted images, or all images if trust is off. A row that was not measured has no rung.
    network: the row of the distilled set; the network that the set was distilled with, if it was measured.

    Each rung holds the summary of its row, and its gain over the rung below. deviation: that of the difference of two
    single runs, the root of the sum of both variances; None if a row has a single run. clear: whether the gain exceeds
    the deviation, or None.
    """
    soft = "initial_hard" in scores
    rows = {
        "given": "random_given",
        "trusted": "random_real",
        "selected": "initial_hard" if soft else "initial",
        **({"labelled": "initial"} if soft else {}),
        "distilled": network,
        "all": "full_trusted" if "full_trusted" in scores else "full_data",
    }
    rungs: list[dict[str, Any]] = []
    for name, row in rows.items():
        if row in scores:
            summary = summarise(scores[row])
            rungs.append({"rung": name, "row": row, **summary} | (_gain(rungs[-1], summary) if rungs else {}))
    return rungs


def _gain(below: Mapping[str, Any], rung: Mapping[str, Any]) -> dict[str, Any]:
    gain, several = rung["mean"] - below["mean"], min(len(below["runs"]), len(rung["runs"])) > 1
    deviation = math.hypot(below["std"], rung["std"]) if several else None
    return {"gain": gain, "deviation": deviation, "clear": None if deviation is None else gain > deviation}
