"""find_label_issues: label errors from a model's probabilities, with cleanlab's arguments."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from tadperf.config.merge import merge
from tadperf.data.open import open_data
from tadperf.trust.audit import audit, find_label_issues

pytestmark = pytest.mark.usefixtures("one_thread")


def model(count: int = 600, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns labels with 20 % errors, a simulated model's probabilities and features, and which labels are wrong."""
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
def test_wrong_labels_are_found_as_mask_and_as_indices(with_features):
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


def test_frac_noise_and_min_examples_per_class():
    labels, p, _, _ = model()
    order = find_label_issues(labels, p, return_indices_ranked_by="self_confidence")
    half = find_label_issues(labels, p, return_indices_ranked_by="self_confidence", frac_noise=0.5)
    assert half.tolist() == order[: len(half)].tolist()
    assert len(half) == round(len(order) / 2)
    left = find_label_issues(labels, p, min_examples_per_class=140)
    assert (np.bincount(labels[~left], minlength=4) >= np.minimum(140, np.bincount(labels))).all()
    assert left.sum() < len(order)


def test_arguments_are_those_of_cleanlab():
    """Names, order and defaults of version 2.9; ours has `features` after the probabilities."""
    names = {name: p.default for name, p in inspect.signature(find_label_issues).parameters.items()}
    assert list(names)[:3] == ["labels", "pred_probs", "features"]
    assert dict(list(names.items())[3:]) == {
        "return_indices_ranked_by": None,
        "rank_by_kwargs": None,
        "filter_by": "prune_by_noise_rate",
        "frac_noise": 1.0,
        "num_to_remove_per_class": None,
        "min_examples_per_class": 1,
        "confident_joint": None,
        "n_jobs": None,
        "verbose": False,
        "multi_label": False,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0, 9, 1])}, "labels: 9 at sample 1: must be in 0..1"),
        ({"labels": np.array([0.0, 1.0, 1.0])}, r"labels: float64 \[3\]: must be integers \[3\]"),
        ({"pred_probs": np.ones((3, 1))}, r"pred_probs: float64 \[3, 1\]: must be floats \[N, C\]"),
        ({"pred_probs": np.full((3, 2), np.nan)}, "pred_probs: NaN or infinite value at sample 0"),
        ({"features": np.ones((2, 4))}, r"features: float64 \[2, 4\]: must be floats \[3, D\]"),
        ({"multi_label": True}, "multi_label: True: must be False"),
        ({"return_indices_ranked_by": "loss"}, "return_indices_ranked_by: 'loss': must be None or one of"),
        ({"filter_by": "nonsense"}, "filter_by: 'nonsense': must be one of prune_by_noise_rate, "),
        ({"min_examples_per_class": -1}, "min_examples_per_class: -1: must be 0 or more"),
        (
            {"pred_probs": np.log(np.full((3, 2), 0.5))},
            r"pred_probs: -0.693\d* at sample 0: must be in \[0, 1\]; apply",
        ),
        (
            {"pred_probs": np.array([[1.5, -0.5], [0.5, 0.5], [0, 1]])},
            r"pred_probs: 1.5 at sample 0: must be in \[0, 1\]",
        ),
        ({"pred_probs": np.full((3, 2), 0.6)}, "pred_probs: sum 1.2 at sample 0: every row must sum to 1"),
        ({"pred_probs": [[0.5, 0.5], [1.0]]}, "pred_probs: list: must be a rectangular array of numbers"),
        ({"labels": ["cat", "dog", "cat"]}, r"labels: <U3 \[3\]: must be an array of numbers"),
        ({"frac_noise": 2.0}, r"frac_noise: 2.0: must be a share in \[0, 1\]"),
    ],
    ids=str,
)
def test_wrong_use(change, message):
    arguments = {"labels": np.array([0, 1, 1]), "pred_probs": np.full((3, 2), 0.5), **change}
    with pytest.raises(ValueError, match=message):
        find_label_issues(**arguments)


def test_ignored_arguments_of_cleanlab_warn():
    labels, p, _, _ = model()
    expected = find_label_issues(labels, p, n_jobs=2, verbose=True)  # neither argument could change a result
    ignored = {"filter_by": "both", "confident_joint": np.eye(4), "num_to_remove_per_class": [1, 1, 1, 1]}
    with pytest.warns(UserWarning, match="ignores filter_by, num_to_remove_per_class, confident_joint: tadperf has"):
        assert np.array_equal(find_label_issues(labels, p, **ignored), expected)


@pytest.mark.parametrize("features", [False, True])
def test_arrays_of_every_kind_give_the_same_result(features):
    labels, p, z, _ = model(200)
    p, z = p.astype("float32"), z.astype("float32")
    expected = find_label_issues(labels, p, z if features else None)
    reverse = find_label_issues(labels[::-1], p[::-1], z[::-1] if features else None)
    lists = find_label_issues(labels.tolist(), p.tolist(), z.tolist() if features else None)
    tensors = (torch.from_numpy(part).requires_grad_() for part in (p, z))
    p_tensor, z_tensor = tensors
    read_only = p.astype(">f4")
    read_only.flags.writeable = False
    assert np.array_equal(lists, expected)
    assert np.array_equal(find_label_issues(labels.astype("uint8"), p_tensor, z_tensor if features else None), expected)
    assert np.array_equal(find_label_issues(labels, read_only, z if features else None), expected)
    if not features:  # with features, the draws of the folds depend on the order of the samples
        assert np.array_equal(reverse[::-1], expected)


def test_audit_restores_threads_and_tf32():
    data = open_data("digits").train.subset(torch.arange(60))
    config = merge("digits", options={"trust.rounds": 1, "trust.proxies": 1, "trust.epochs": 1, "net.width": 4})
    before = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    audit(data, config)
    assert before == (
        torch.get_num_threads(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )
