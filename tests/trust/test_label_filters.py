"""The filters and scores of confident learning against figures of cleanlab 2.9.0, recorded from its own functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tadperf.trust import find_label_issues, label_quality_scores

pytestmark = pytest.mark.usefixtures("one_thread")


def overlapping() -> tuple[np.ndarray, np.ndarray]:
    """Returns labels with 20 % errors and the probabilities of a weak model."""
    rng = np.random.default_rng(5)
    clean = np.arange(600) % 4
    z = 3 * np.eye(4)[clean] + 1.3 * rng.normal(size=(600, 4))
    wrong = rng.random(600) < 0.2
    return np.where(wrong, (clean + rng.integers(1, 4, 600)) % 4, clean), np.exp(z) / np.exp(z).sum(1, keepdims=True)


# Arguments, and the number of issues that cleanlab finds in each class.
CLEANLAB: list[tuple[dict[str, Any], list[int]]] = [
    ({"filter_by": "prune_by_class"}, [37, 40, 35, 42]),
    ({"filter_by": "both"}, [35, 37, 30, 39]),
    ({"filter_by": "confident_learning"}, [30, 32, 27, 36]),
    ({"filter_by": "predicted_neq_given"}, [46, 44, 47, 49]),
    ({"filter_by": "low_normalized_margin"}, [28, 32, 27, 38]),
    ({"filter_by": "low_self_confidence"}, [27, 28, 33, 37]),
    ({"filter_by": "prune_by_class", "num_to_remove_per_class": [5, 0, 1, 2]}, [5, 0, 1, 2]),
    ({"filter_by": "prune_by_class", "min_examples_per_class": 125}, [24, 31, 25, 20]),
    ({"filter_by": "prune_by_class", "frac_noise": 0.5}, [19, 21, 18, 21]),
    ({"filter_by": "both", "frac_noise": 0.5}, [14, 18, 14, 17]),
]


@pytest.mark.parametrize(("arguments", "expected"), CLEANLAB, ids=str)
def test_each_argument_returns_as_many_issues_as_in_cleanlab(arguments: dict[str, Any], expected: list[int]):
    """frac_noise rounds differently: up to two issues of a class."""
    labels, p = overlapping()
    mask = find_label_issues(labels, p, **arguments)
    difference = np.bincount(labels[mask], minlength=4) - expected
    assert np.abs(difference).max() <= (2 if "frac_noise" in arguments else 1)
    assert np.abs(difference).sum() <= (4 if "frac_noise" in arguments else 1)


@pytest.mark.parametrize(
    ("method", "scores", "first"),
    [
        ("self_confidence", [0.72917501, 0.01269802, 0.71842294], [574, 505, 154, 38, 402]),
        ("normalized_margin", [0.77565691, 0.09840435, 0.75415166], [505, 38, 204, 587, 402]),
        ("confidence_weighted_entropy", [0.73565521, 0.10703862, 0.74031389], [154, 56, 79, 588, 481]),
    ],
)
def test_scores_and_order_are_those_of_cleanlab(method: str, scores: list[float], first: list[int]):
    labels, p = overlapping()
    assert label_quality_scores(labels, p, method=method)[:3] == pytest.approx(scores, abs=1e-6)
    order = find_label_issues(labels, p, filter_by="confident_learning", return_indices_ranked_by=method)
    assert order[:5].tolist() == first


def test_a_certain_right_label_has_the_best_score():
    for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
        assert label_quality_scores([0, 1], [[1.0, 0.0], [1.0, 0.0]], method=method)[0] == pytest.approx(1)


def test_a_joint_is_scaled_to_the_number_of_labels():
    """Half of the joint's counts give the same issues."""
    labels, p = overlapping()
    joint = np.diag([100.0] * 4) + 10
    for filter_by in ("prune_by_noise_rate", "prune_by_class", "both"):
        whole, half = (find_label_issues(labels, p, filter_by=filter_by, confident_joint=j) for j in (joint, joint / 2))
        assert np.array_equal(whole, half)
        assert whole.sum() > 100
