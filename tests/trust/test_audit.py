"""find_label_issues: label errors from probabilities or features, with cleanlab's arguments; audit."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from tadperf.config.merge import merge
from tadperf.data.open import open_data
from tadperf.trust import audit, find_label_issues, label_quality_scores

from .simulated import simulated_labels

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("inputs", ["probabilities", "features", "both"])
def test_wrong_labels_are_found_as_mask_and_as_indices(inputs):
    labels, p, z, clean = simulated_labels()
    wrong = labels != clean
    p, features = (None if inputs == "features" else p), (None if inputs == "probabilities" else z)
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
    labels, p, _, _ = simulated_labels()
    order = find_label_issues(labels, p, return_indices_ranked_by="noise_channel")
    half = find_label_issues(labels, p, return_indices_ranked_by="noise_channel", frac_noise=0.5)
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
        ({"frac_noise": 0.5, "filter_by": "confident_learning"}, "frac_noise: does not work with filter_by confident"),
        ({"confident_joint": np.eye(3)}, r"confident_joint: float64 \[3, 3\]: must be counts \[2, 2\]"),
        ({"num_to_remove_per_class": [9, 0]}, r"num_to_remove_per_class: 9 for class 0: must be in 0..1"),
        ({"num_to_remove_per_class": 2}, r"num_to_remove_per_class: 2 for class 0: must be in 0..1"),
        ({"num_to_remove_per_class": [1]}, r"num_to_remove_per_class: int64 \[1\]: must be integers \[2\]"),
        ({"rank_by_kwargs": {"typo": 1}}, "rank_by_kwargs: typo: only adjust_pred_probs is supported"),
        ({"rank_by_kwargs": {"adjust_pred_probs": True}}, "adjust_pred_probs: needs ranking by self_confidence or"),
        ({"n_jobs": 0}, "n_jobs: 0: must be None or 1 or more"),
        ({"pred_probs": None}, r"pred_probs: None: give pred_probs \[N, C\], features \[N, D\], or both"),
    ],
    ids=str,
)
def test_wrong_use(change, message):
    arguments = {"labels": np.array([0, 1, 1]), "pred_probs": np.full((3, 2), 0.5), **change}
    with pytest.raises(ValueError, match=message):
        find_label_issues(**arguments)


def test_wrong_labels_of_one_other_class_are_found():
    """45 % of class c are labelled c + 1; the model has learned these shares."""
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 5, 4000)
    wrong = rng.random(4000) < 0.45
    labels = np.where(wrong, (clean + 1) % 5, clean)
    shares = np.full((5, 5), 0.01) + np.diag(np.full(5, 0.53)) + np.roll(np.diag(np.full(5, 0.42)), 1, axis=1)
    p = 0.7 * (shares / shares.sum(1, keepdims=True))[clean] + 0.3 * rng.dirichlet(np.ones(5), 4000)
    mask = find_label_issues(labels, p)
    assert (mask & wrong).sum() / mask.sum() > 0.95
    assert (mask & wrong).sum() / wrong.sum() > 0.95
    assert wrong[p.argmax(1) != labels].mean() < 0.9  # the likeliest class does worse


def test_exact_zeros_of_few_votes_do_no_harm():
    """Shares of 10 votes, as from 10 neighbours: the score of most labels is an exact zero or one."""
    rng = np.random.default_rng(0)
    clean, wrong = rng.integers(0, 4, 2000), rng.random(2000) < 0.2
    labels = np.where(wrong, (clean + rng.integers(1, 4, 2000)) % 4, clean)
    chances = np.full((4, 4), 0.06) + np.diag(np.full(4, 0.76))
    p = np.stack([rng.multinomial(10, chances[k]) for k in clean]) / 10
    mask = find_label_issues(labels, p)
    assert 2 * (mask & wrong).sum() / (mask.sum() + wrong.sum()) > 0.95


@pytest.mark.parametrize("classes", [2, 10])
def test_certain_right_probabilities_give_no_issue(classes):
    labels = np.arange(400) % classes
    assert not find_label_issues(labels, np.eye(classes)[labels]).any()


def test_a_class_without_labels_is_no_true_class():
    p = np.random.default_rng(0).dirichlet(np.ones(3), 600)
    assert not find_label_issues(np.zeros(600, dtype=int), p).any()


def test_features_alone_work_for_more_features_than_samples():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    z = rng.normal(size=(60, 200)) + 3 * np.eye(3)[labels] @ rng.normal(size=(3, 200))
    labels[:3] = (labels[:3] + 1) % 3
    order = find_label_issues(labels, features=z, return_indices_ranked_by="noise_channel")
    assert set(order[:3]) == {0, 1, 2}


def test_numbers_to_remove_from_each_class():
    labels, p, _, _ = simulated_labels()
    remove = [5, 0, 1, 2]
    for filter_by in ("prune_by_class", "prune_by_noise_rate"):
        mask = find_label_issues(labels, p, filter_by=filter_by, num_to_remove_per_class=remove)
        assert np.bincount(labels[mask], minlength=4).tolist() == remove
    by_class = find_label_issues(labels, p, filter_by="prune_by_class", num_to_remove_per_class=remove)
    own = p[np.arange(len(labels)), labels]
    assert set(np.flatnonzero(by_class & (labels == 0))) == set(
        np.flatnonzero(labels == 0)[own[labels == 0].argsort()[:5]]
    )
    same = find_label_issues(labels, p, filter_by="prune_by_class", num_to_remove_per_class=5)  # one number for all
    assert np.bincount(labels[same], minlength=4).tolist() == [5, 5, 5, 5]


def test_long_doubles_are_taken_as_doubles():
    labels, p, _, _ = simulated_labels()
    mask = find_label_issues(labels, p.astype(np.longdouble))
    assert mask.tolist() == find_label_issues(labels, p.astype(np.float64)).tolist()


def test_filters_of_confident_learning():
    labels, p, _, clean = simulated_labels()
    wrong = labels != clean
    masks = {
        name: find_label_issues(labels, p, filter_by=name)
        for name in (
            "prune_by_class",
            "both",
            "confident_learning",
            "predicted_neq_given",
            "low_normalized_margin",
            "low_self_confidence",
        )
    }
    assert np.array_equal(masks["predicted_neq_given"], p.argmax(1) != labels)
    for name, mask in masks.items():
        assert 2 * (mask & wrong).sum() / (mask.sum() + wrong.sum()) > 0.85, name
    joint = np.diag(np.bincount(labels)).astype(float)
    assert not find_label_issues(labels, p, confident_joint=joint).any()
    joint[0, 1] = joint[0, 0]  # half of class 0 is class 1
    rates = find_label_issues(labels, p, confident_joint=joint)
    assert set(labels[rates]) == {0}
    with pytest.warns(UserWarning, match="confident_joint: filter_by predicted_neq_given does not use it"):
        same = find_label_issues(labels, p, filter_by="predicted_neq_given", confident_joint=joint)
    assert np.array_equal(same, masks["predicted_neq_given"])
    assert not (masks["both"] & ~masks["prune_by_class"]).any()


@pytest.mark.parametrize("method", ["noise_channel", "self_confidence", "normalized_margin"])
def test_order_of_indices_is_that_of_the_quality_scores(method):
    labels, p, _, _ = simulated_labels()
    order = find_label_issues(labels, p, return_indices_ranked_by=method)
    scores = label_quality_scores(labels, p, method=method)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert (np.diff(scores[order]) >= 0).all()


def test_quality_scores_have_the_values_of_their_formulas():
    labels, p = np.array([0, 1]), np.array([[0.5, 0.25, 0.25], [0.9, 0.1, 0.0]])
    assert label_quality_scores(labels, p, method="self_confidence") == pytest.approx([0.5, 0.1])
    assert label_quality_scores(labels, p, method="normalized_margin") == pytest.approx([0.625, 0.1])
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1) / np.log(3) / np.array([0.5, 0.1])
    expected = np.log1p(entropy) / entropy
    assert label_quality_scores(labels, p, method="confidence_weighted_entropy") == pytest.approx(expected)
    adjusted = label_quality_scores(labels, p, method="self_confidence", adjust_pred_probs=True)
    shifted = p + 1 - np.array([0.5, 0.1, 1.0])  # class 2 has no label
    assert adjusted == pytest.approx((shifted / shifted.sum(1, keepdims=True))[[0, 1], labels])


@pytest.mark.parametrize("features", [False, True])
def test_arrays_of_every_kind_give_the_same_result(features):
    labels, p, z, _ = simulated_labels(200)
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
