"""Prototypes: centres of every class or the samples nearest to them, from trusted samples only."""

from __future__ import annotations

import pytest
import torch

from tadperf.config import RefineConfig
from tadperf.errors import UserError
from tadperf.refine.prototypes import class_prototypes, inliers

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("ant", "bee")


def clusters(per: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns uint8 images [N, 1, 4, 4] and labels: two classes with two clusters each, around four grey levels."""
    levels = torch.tensor([20, 90, 160, 230]).repeat_interleave(per)
    noise = torch.randint(-4, 5, (4 * per, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    return (levels[:, None, None, None] + noise).to(torch.uint8), torch.arange(2).repeat_interleave(2 * per)


def centres_of(images: torch.Tensor, labels: torch.Tensor, ipc: int = 2, **values) -> torch.Tensor:
    config = RefineConfig(**values)

    def encode(x: torch.Tensor) -> torch.Tensor:
        return x.float() / 255

    return class_prototypes(lambda index: images[index], encode, labels, NAMES, ipc, config, 0)


def test_centres_are_the_means_of_the_clusters():
    images, labels = clusters()
    centres = centres_of(images, labels)
    means = (images.float() / 255).view(4, 8, 1, 4, 4).mean(1)
    for label in range(2):
        points, expected = centres[2 * label : 2 * label + 2], means[2 * label : 2 * label + 2]
        order = points.flatten(1).mean(1).argsort()
        torch.testing.assert_close(points[order], expected)


def test_pixels_give_samples_nearest_to_the_centres():
    images, labels = clusters()
    centres = centres_of(images, labels, prototypes="pixels")
    for label in range(2):
        points = images[labels == label].float() / 255
        distance = torch.cdist(centres[2 * label : 2 * label + 2].flatten(1), points.flatten(1))
        assert torch.equal(distance.min(1).values, torch.zeros(2))  # each prototype is a sample of the class
        assert (distance.argmin(1) // 8).sort().values.tolist() == [0, 1]  # one of each cluster


def test_samples_that_are_not_trusted_are_left_out():
    images, labels = clusters()
    partly_trusted = labels.clone()
    partly_trusted[8:16] = -1  # the second cluster of the first class
    assert centres_of(images, partly_trusted)[:2].max() < 0.15
    partly_trusted[:7] = -1
    with pytest.raises(UserError, match=r"^--ipc: 2: class 'ant' has 1 trusted sample; use fewer"):
        centres_of(images, partly_trusted)
    partly_trusted[:8] = -1
    with pytest.raises(UserError, match="class 'ant' has no trusted samples;"):
        centres_of(images, partly_trusted)


def test_points_far_from_their_neighbours_are_outliers():
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    points[[5, 17]] += 30 * torch.tensor([[1.0, 0, 0], [0, -1.0, 0]])
    assert (~inliers(points, 0.05, 1)).nonzero()[:, 0].tolist() == [5, 17]
    assert inliers(points, 0.0, 1).all()
    assert inliers(points, 0.4, 39).sum() == 39  # keeps at least as many points as prototypes
    images, labels = clusters(40)
    images[3] = 255
    assert centres_of(images, labels, 3, outliers=0.02)[:3].max() < 0.5 < centres_of(images, labels, 3)[:3].max()


def test_one_seed_gives_one_result():
    images, labels = clusters()
    before = torch.get_num_threads()
    first = centres_of(images, labels, ipc=3)
    torch.set_num_threads(before + 1)
    try:
        assert torch.equal(centres_of(images, labels, ipc=3), first)
    finally:
        torch.set_num_threads(before)
