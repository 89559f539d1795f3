"""RD3's training: its learning rate, its augmentations, and its labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tadperf.nets.rd3 import RD3_RECIPE, cut_mix, fit_rd3, resized_crop_flip, smoothed_cosine, smoothing

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_learning_rate_falls_to_0_or_to_a_half():
    torch.testing.assert_close(
        [smoothed_cosine(epoch, 400, 1.0) for epoch in (0, 200, 400)], [1.0, 0.5, 0.0], atol=1e-12, rtol=0
    )
    assert smoothed_cosine(400, 400, 2.0) == pytest.approx(0.5)
    assert (smoothing("resnet18"), smoothing("convnet")) == (1.0, 2.0)
    assert RD3_RECIPE[:3] == (400, 50, 1e-3)


def test_cut_mix_pastes_the_share_that_it_reports():
    x = torch.arange(6.0)[:, None, None, None].expand(6, 2, 16, 16).clone()
    for seed in range(20):
        mixed, partner, share = cut_mix(x, torch.Generator().manual_seed(seed))
        for k in range(6):
            kept = float((mixed[k] == k).float().mean()) if int(partner[k]) != k else share
            assert kept == pytest.approx(share)
            assert set(mixed[k].unique().tolist()) <= {float(k), float(partner[k])}


def test_crops_lie_inside_the_image_and_half_are_flipped():
    """A horizontal ramp stays a ramp inside its range; the sign of its slope shows the flip."""
    ramp = torch.linspace(-1, 1, 32).expand(400, 1, 32, 32).contiguous()
    cropped = resized_crop_flip(ramp, torch.Generator().manual_seed(0))
    assert float(cropped.abs().max()) <= 1 + 1e-5
    slope = cropped[:, 0, 16, 31] - cropped[:, 0, 16, 0]
    assert 0.4 < float((slope < 0).float().mean()) < 0.6
    widths = (slope.abs() / 2).square()  # square of the relative width, between 0.08 * 3/4 and 1
    assert float(widths.min()) > 0.05
    assert float(widths.max()) <= 1.001
    assert float(widths.std()) > 0.1


class Constant(nn.Module):
    """A teacher that always answers class 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 20 * nn.functional.one_hot(torch.ones(len(x), dtype=torch.int64), 2).float()


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))


def train(teacher: nn.Module | None, **changes: Any) -> nn.Module:
    images, labels = torch.randn(30, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(30).long()
    module, recipe = student(), RD3_RECIPE._replace(epochs=60, batch=10, lr=0.01)._replace(**changes)
    assert list(fit_rd3(module, images, labels, 2, recipe, 1.0, 3, teacher)) == list(range(60))
    return module


def test_the_teacher_labels_the_images_or_the_classes_do():
    x = torch.zeros(1, 1, 4, 4)
    assert int(train(Constant())(x).argmax()) == 1
    assert int(train(None)(x).argmax()) == 0


def test_a_training_depends_on_its_seed_and_augmentation_alone():
    first, again, plain = (train(None, augment=augment) for augment in ("rd3", "rd3", "none"))
    weights = [next(module.parameters()) for module in (first, again, plain)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
