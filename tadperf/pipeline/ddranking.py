"""The scores of DD-Ranking (Li et al., 2025, arXiv 2505.13300), from accuracies as shares in [0, 1]."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

WEIGHT = 0.5  # of both halves of a score; the leaderboard's value


def normalised_score(value: float) -> float:
    """Maps a weighted sum in [-1, 1] to [0, 1]: (e^value - e^-1) / (e - e^-1). A value of 0 gives 0.269."""
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def label_robust_score(hard: float, ours: float, random: float, full: float) -> float:
    """Returns LRS. hard: accuracy of the set with hard labels. ours, random: of the set and of random images, trained
    as the method wants. full: of the real data with hard labels.

    IOR = ours - random is the improvement over random images, HLR = full - hard the hard label recovery.
    """
    return normalised_score(WEIGHT * (ours - random) - (1 - WEIGHT) * (full - hard))


def augmentation_robust_score(ours: float, random: float, ours_plain: float, random_plain: float) -> float:
    """Returns ARS. ours, random: accuracies of the set and of random images. _plain: trained without augmentation."""
    return normalised_score(WEIGHT * (ours - random) + (1 - WEIGHT) * (ours_plain - random_plain))


def ddranking_scores(
    ours: Sequence[float],
    random: Sequence[float],
    hard: Sequence[float],
    ours_plain: Sequence[float],
    random_plain: Sequence[float],
    full: Sequence[float],
) -> dict[str, Any]:
    """Returns LRS, ARS and their parts: the mean and the standard deviation over the repeats.

    full: one accuracy or more; their mean counts. The deviation is that of the population, as in DD-Ranking's code.
    DD-Ranking keeps the best accuracy and learning rate on the test data. tadperf tests once, after the last epoch.
    """
    whole = statistics.fmean(full)
    pairs = list(zip(ours, random, hard, ours_plain, random_plain, strict=True))
    columns = {
        "lrs": [label_robust_score(h, o, r, whole) for o, r, h, _, _ in pairs],
        "ars": [augmentation_robust_score(o, r, op, rp) for o, r, _, op, rp in pairs],
        "hard_label_recovery": [whole - h for h in hard],
        "improvement_over_random": [o - r for o, r in zip(ours, random, strict=True)],
        "improvement_without_augmentation": [o - r for o, r in zip(ours_plain, random_plain, strict=True)],
    }
    return {
        name: {"mean": statistics.fmean(runs), "std": statistics.pstdev(runs), "runs": runs}
        for name, runs in columns.items()
    }
