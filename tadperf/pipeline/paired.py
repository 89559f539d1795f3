"""Statistics of accuracies: intervals, and the paired test that decides whether a difference is a gain."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

LEVEL = 0.05  # of the tests; the intervals cover 1 - LEVEL
MOST_EXACT = 20  # pairs up to which all 2^n signs are counted: a million sums, 8 MB
RANDOM_SIGNS = 1 << 17  # random signs for more pairs; the standard error of p = 0.05 is 0.0006
CHUNK = 1 << 12  # random signs drawn at a time


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Returns the 95 % confidence interval of the mean by Student's t distribution; None for fewer than two values."""
    from scipy.special import stdtrit

    if len(values) < 2:
        return None
    half = float(stdtrit(len(values) - 1, 1 - LEVEL / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def sign_flip_p(differences: Sequence[float]) -> float:
    """Returns the two-sided p of the paired permutation test of the mean: how often random signs reach its size.

    Under the null hypothesis the two members of a pair can be exchanged, so every sign of a difference is equally
    likely (Fisher, 1935). The test needs no normal distribution; accuracies are bounded, discrete and few. Up to
    MOST_EXACT pairs all signs are counted, and p is exact. For more pairs, random signs estimate it, and the signs that
    were observed count as one of them, so p is never 0. n pairs cannot give less than 2 / 2^n: 5 % needs 6 pairs.
    """
    values = torch.tensor(differences, dtype=torch.float64)
    observed = float(values.sum().abs()) - 1e-9  # equal sums may differ by rounding
    if len(values) <= MOST_EXACT:
        sums = torch.zeros(1, dtype=torch.float64)
        for value in values:
            sums = torch.cat([sums + value, sums - value])
        return float((sums.abs() >= observed).double().mean())
    generator, reached = torch.Generator().manual_seed(0), 0
    for _ in range(RANDOM_SIGNS // CHUNK):
        signs = 2 * torch.randint(0, 2, (CHUNK, len(values)), generator=generator).double() - 1
        reached += int(((signs @ values).abs() >= observed).sum())
    return (1 + reached) / (1 + RANDOM_SIGNS)


def compare_rows(ours: Sequence[float], others: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Compares accuracies with those of other rows, paired by repeat (tadperf).

    Returns for each row the mean difference, its interval and p, and a verdict over all rows. "gain": ours is higher
    than every row, each with p < LEVEL. This needs no correction for several tests: the largest p is that of the
    intersection-union test (Berger, 1982). "worse": a row is higher than ours with p < LEVEL / number of rows
    (Bonferroni). Else "no difference", and "too few runs" if no p can fall below LEVEL.
    best: the row with the highest mean. gain: the difference to it. p: the largest p.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in others.items():
        differences = [a - b for a, b in zip(ours, runs, strict=True)]
        mean, p = statistics.fmean(differences), sign_flip_p(differences)
        rows[name] = {"difference": mean, "interval": interval(differences), "p": p}
    best = max(others, key=lambda name: statistics.fmean(others[name]))
    largest = max(row["p"] for row in rows.values())
    if 2 / 2 ** len(ours) >= LEVEL:
        verdict = "too few runs"
    elif largest < LEVEL and all(row["difference"] > 0 for row in rows.values()):
        verdict = "gain"
    elif any(row["difference"] < 0 and row["p"] < LEVEL / len(rows) for row in rows.values()):
        verdict = "worse"
    else:
        verdict = "no difference"
    return {"rows": rows, "best": best, "gain": rows[best]["difference"], "p": largest, "verdict": verdict}
