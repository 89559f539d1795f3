"""Intervals and the paired test against SciPy, and the verdict over several rows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import tadperf.pipeline.paired as paired
from tadperf.pipeline.paired import compare_rows, interval, sign_flip_p


@pytest.mark.parametrize("count", [2, 5, 10, 40])
def test_the_interval_equals_that_of_scipy(count):
    values = np.random.default_rng(count).normal(0.9, 0.02, count)
    bounds = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert interval(values.tolist()) == pytest.approx(bounds, abs=1e-12)


def test_one_run_has_no_interval():
    assert interval([0.9]) is None


def scipy_p(differences: np.ndarray) -> float:
    zeros = np.zeros_like(differences)
    test = stats.permutation_test(
        (differences, zeros), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=10**6
    )
    return float(test.pvalue)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 3, 6, 9])
def test_the_exact_test_equals_that_of_scipy(count, seed):
    """Half of the differences are multiples of 1/397, as accuracies on 397 images are, so sums are often equal."""
    rng = np.random.default_rng([seed, count])
    differences = rng.integers(-3, 6, count) / 397 if seed % 2 else rng.normal(0.01, 0.01, count)
    assert sign_flip_p(differences.tolist()) == pytest.approx(scipy_p(differences), abs=1e-12)


def test_many_pairs_are_tested_by_random_signs(monkeypatch):
    differences = np.random.default_rng(0).normal(0.005, 0.01, 12).tolist()
    exact = sign_flip_p(differences)
    assert 0.02 < exact < 0.9
    monkeypatch.setattr(paired, "MOST_EXACT", 0)
    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.005)  # the standard error is 0.0014 at most
    assert sign_flip_p([0.01] * 30) == pytest.approx(1 / (1 + paired.RANDOM_SIGNS))  # never 0


def test_equal_rows_have_p_1():
    assert sign_flip_p([0.0] * 8) == 1.0


def test_without_a_difference_the_test_rejects_at_its_level():
    """Of 400 pairs of rows from one distribution about 5 % may have p < 0.05; 11 % is four deviations away."""
    draws = np.random.default_rng(1).normal(0, 0.01, (400, 8))
    rejected = np.mean([sign_flip_p(row.tolist()) < 0.05 for row in draws])
    assert 0.01 < rejected < 0.095


RUNS = [0.90, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97]


def shifted(by: float) -> list[float]:
    """Returns the runs minus about `by`; the differences have different sizes."""
    return [run - by * (1 + 0.1 * k) for k, run in enumerate(RUNS)]


@pytest.mark.parametrize(
    ("others", "best", "verdict"),
    [
        ({"a": shifted(0.02), "b": shifted(0.01)}, "b", "gain"),
        ({"a": shifted(0.02), "b": RUNS[::-1]}, "b", "no difference"),  # better than one row is no gain
        ({"a": shifted(0.02), "b": shifted(-0.01)}, "b", "worse"),
        ({"a": RUNS}, "a", "no difference"),
    ],
)
def test_a_gain_is_claimed_over_every_row_only(others, best, verdict):
    found = compare_rows(RUNS, others)
    assert (found["best"], found["verdict"]) == (best, verdict)
    assert found["gain"] == pytest.approx(np.mean(RUNS) - np.mean(others[best]))
    assert found["p"] == max(row["p"] for row in found["rows"].values())
    for name, row in found["rows"].items():
        assert row["p"] == pytest.approx(scipy_p(np.subtract(RUNS, others[name])), abs=1e-12)


def test_five_pairs_give_no_verdict():
    """Their smallest p is 2 / 32 = 0.0625."""
    found = compare_rows(RUNS[:5], {"a": shifted(0.02)[:5]})
    assert (found["p"], found["verdict"]) == (0.0625, "too few runs")
    assert compare_rows(RUNS[:6], {"a": shifted(0.02)[:6]})["verdict"] == "gain"
