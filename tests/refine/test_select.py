"""The anomaly rule, the choice among candidates, and the reported diversity."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tadperf.config import RefineConfig
from tadperf.refine.detector import DetectorOutput
from tadperf.refine.select import choose, confidence, diversity, is_anomalous

pytestmark = pytest.mark.usefixtures("one_thread")


def config(**values) -> RefineConfig:
    return RefineConfig(**values)


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    """Returns logits with the rows as softmax."""
    return torch.tensor(rows).log()


def test_an_image_is_anomalous_if_misclassified_or_below_beta():
    class_logits = logits((0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.1, 0.8, 0.1), (0.98, 0.01, 0.01))
    assert is_anomalous(class_logits, torch.tensor([0, 0, 0, 2]), 0.7).tolist() == [False, True, True, True]
    assert is_anomalous(class_logits, torch.tensor([0, 0, 0, 2]), 0.0).tolist() == [False, False, True, True]
    assert is_anomalous(class_logits, torch.tensor([0, 0, 1, 0]), 1.0).all()
    broken = torch.tensor([[math.nan, 1.0, 0.0], [math.inf, 0.0, 0.0]])
    assert is_anomalous(broken, torch.tensor([0, 0]), 0.0).tolist()[0]


def test_confidences_beyond_float32_keep_their_order():
    class_logits = torch.tensor([[20.0, 0.0], [25.0, 0.0], [30.0, 0.0]])
    assert (class_logits.softmax(1)[1:, 0] == 1).all()
    assert (confidence(class_logits, torch.zeros(3, dtype=torch.int64)).diff() > 0).all()


FEATURES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])


def test_the_least_similar_candidate_of_the_pool_wins():
    candidates = DetectorOutput(logits((0.9, 0.1), (0.8, 0.2), (0.7, 0.3))[None], FEATURES[None])
    qualified, labels = torch.tensor([[1.0, 0.1]]), torch.tensor([0])

    def winner(**values) -> int:
        return int(choose(candidates, labels, qualified, labels, config(**values)))

    assert winner(top_k=3) == 1  # orthogonal to the qualified image
    assert winner(top_k=1) == 0  # only the most confident
    assert winner(top_k=3, weight=0.01) == 0
    assert winner(top_k=3, weight=10.0) == 1


def test_a_candidate_with_the_wrong_label_wins_only_if_all_are_wrong():
    qualified, labels = torch.tensor([[1.0, 0.1]]), torch.tensor([0])
    one = DetectorOutput(logits((0.9, 0.1), (0.2, 0.8), (0.7, 0.3))[None], FEATURES[None])
    assert (
        int(choose(one, labels, qualified, labels, config(top_k=3))) == 2
    )  # candidate 1 is the least similar, but has the wrong label
    none = DetectorOutput(logits((0.4, 0.6), (0.2, 0.8), (0.3, 0.7))[None], FEATURES[None])
    assert int(choose(none, labels, qualified, labels, config(top_k=2))) == 2
    lost = DetectorOutput(torch.full((1, 3, 2), math.nan), FEATURES[None])
    assert int(choose(lost, labels, qualified, labels, config())) == -1


def test_a_winner_joins_the_qualified_images_at_once():
    candidates = DetectorOutput(
        logits((0.9, 0.1), (0.9, 0.1))[None].repeat(2, 1, 1), FEATURES[None, :2].repeat(2, 1, 1)
    )
    labels = torch.tensor([0, 0])
    qualified = torch.tensor([[1.0, 0.2]])
    assert choose(candidates, labels, qualified, labels[:1], config(top_k=2)).tolist() == [1, 0]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), dimension=st.integers(1, 9), seed=st.integers(0, 99))
def test_diversity_is_the_mean_over_pairs(sizes, dimension, seed):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    features = torch.randn(len(labels), dimension, generator=torch.Generator().manual_seed(seed))
    means = []
    for label in range(len(sizes)):
        own = features[labels == label].double()
        pairs = [float((a - b).norm()) for a, b in itertools.combinations(own, 2)]
        means += [sum(pairs) / len(pairs)] if pairs else []
    expected = sum(means) / len(means) if means else math.nan
    assert diversity(features, labels) == pytest.approx(expected, rel=1e-6, nan_ok=True)
