"""Label issues from a model's probabilities, in cleanlab's form."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from tadperf.trust.audit import find_label_issues

pytestmark = pytest.mark.usefixtures("one_thread")


def model(count: int = 600, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels with 20 % errors, probabilities and features of a fair model, and which labels are wrong."""
    rng = np.random.default_rng(seed)
    clean = np.arange(count) % classes
    centres = rng.normal(size=(classes, 8)) * 2
    z = centres[clean] + rng.normal(size=(count, 8))
    logits = -((z[:, None] - centres[None]) ** 2).sum(2) / 2
    p = np.exp(logits - logits.max(1, keepdims=True))
    wrong = rng.random(count) < 0.2
    labels = np.where(wrong, (clean + rng.integers(1, classes, count)) % classes, clean)
    return labels, p / p.sum(1, keepdims=True), z, wrong


@pytest.mark.parametrize("with_features", [False, True])
def test_wrong_labels_are_found_in_both_forms(with_features):
    labels, p, z, wrong = model()
    features = z if with_features else None
    mask = find_label_issues(labels, p, features)
    assert mask.dtype == bool
    assert mask.shape == (600,)
    assert (mask & wrong).sum() / mask.sum() > 0.9
    assert (mask & wrong).sum() / wrong.sum() > 0.9
    order = find_label_issues(list(labels), p, features, return_indices_ranked_by="self_confidence")
    assert order.dtype.kind == "i"
    assert sorted(order) == np.flatnonzero(mask).tolist()
    assert wrong[order[: len(order) // 2]].all()


def test_frac_noise_keeps_the_worst_and_a_class_keeps_its_least():
    labels, p, _, _ = model()
    order = find_label_issues(labels, p, return_indices_ranked_by="self_confidence")
    half = find_label_issues(labels, p, return_indices_ranked_by="self_confidence", frac_noise=0.5)
    assert half.tolist() == order[: len(half)].tolist()
    assert len(half) == round(len(order) / 2)
    left = find_label_issues(labels, p, min_examples_per_class=140)
    assert (np.bincount(labels[~left], minlength=4) >= np.minimum(140, np.bincount(labels))).all()
    assert left.sum() < len(order)


def test_arguments_are_those_of_cleanlab():
    """Of version 2.9, in order, with its defaults; ours has `features` after the probabilities."""
    names = {name: p.default for name, p in inspect.signature(find_label_issues).parameters.items()}
    assert list(names)[:3] == ["labels", "pred_probs", "features"]
    assert dict(list(names.items())[3:]) == {
        "return_indices_ranked_by": None, "rank_by_kwargs": None, "filter_by": "prune_by_noise_rate",
        "frac_noise": 1.0, "num_to_remove_per_class": None, "min_examples_per_class": 1, "confident_joint": None,
        "n_jobs": None, "verbose": False, "multi_label": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0, 9, 1])}, "labels: 9 at sample 1: expected 0 to 1"),
        ({"labels": np.array([0.0, 1.0, 1.0])}, r"labels: float64 \(3,\): expected integers \(3,\)"),
        ({"pred_probs": np.ones((3, 1))}, r"pred_probs: float64 \(3, 1\): expected floats \[N, C\]"),
        ({"pred_probs": np.full((3, 2), np.nan)}, "pred_probs: a value that is not finite at sample 0"),
        ({"features": np.ones((2, 4))}, r"features: float64 \(2, 4\): expected floats \[3, D\]"),
        ({"multi_label": True}, "multi_label: True: expected False"),
        ({"return_indices_ranked_by": "loss"}, "return_indices_ranked_by: 'loss': expected None or one of"),
        ({"frac_noise": 2.0}, r"frac_noise: 2.0: expected a share in \[0, 1\]"),
    ],
    ids=str,
)
def test_wrong_use(change, message):
    given = {"labels": np.array([0, 1, 1]), "pred_probs": np.full((3, 2), 0.5), **change}
    with pytest.raises(ValueError, match=message):
        find_label_issues(**given)
