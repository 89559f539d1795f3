"""The k-centre coreset against a brute-force greedy search."""

from __future__ import annotations

import pytest
import torch

from tadperf.data.images import ImageSubset
from tadperf.pipeline.coresets import k_centres, pick_k_centres


def brute_force(points: torch.Tensor, count: int) -> list[int]:
    """Chooses in each step the point whose nearest chosen point is the farthest, by all distances."""
    distance = torch.cdist(points.double(), points.double())
    chosen = [min(range(len(points)), key=lambda k: float((points[k] - points.mean(0)).double().norm()))]
    while len(chosen) < count:
        left = [k for k in range(len(points)) if k not in chosen]
        chosen.append(max(left, key=lambda k: min(float(distance[k, c]) for c in chosen)))
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_greedy_k_centres_equal_the_brute_force(seed):
    points = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
    assert k_centres(points, 12).tolist() == brute_force(points, 12)


def test_equal_points_are_chosen_once_each():
    assert sorted(k_centres(torch.ones(5, 3), 5).tolist()) == [0, 1, 2, 3, 4]
    assert k_centres(torch.ones(3, 2), 9).tolist() == [0, 1, 2]


def test_samples_of_each_class_come_from_the_allowed_ones():
    images = torch.randn(60, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 3
    labels[::7] = -1  # may not be chosen
    index = pick_k_centres(images, labels, 4, seed=0)
    assert labels[index].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(index.unique()) == 12
    for label in range(3):
        rows = (labels == label).nonzero()[:, 0]
        expected = rows[brute_force(images[rows].flatten(1), 4)]
        assert index[4 * label : 4 * label + 4].tolist() == expected.tolist()
    subset = ImageSubset(images, torch.arange(60))
    assert torch.equal(pick_k_centres(subset, labels, 4, seed=0), index)
