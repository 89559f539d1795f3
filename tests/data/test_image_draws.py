"""The draws of training steps: selected, cut and moved together."""

from __future__ import annotations

import pytest
import torch

from tadperf.data import augment
from tadperf.data.image_draws import ImageDraws
from tadperf.data.images import ImageSubset, LazyImages, first_image, index_device
from tadperf.data.normalise import fit_normaliser


def draws(strategy: str) -> ImageDraws:
    generator = torch.Generator().manual_seed(0)
    return ImageDraws(torch.randperm(9, generator=generator), augment.draw(strategy, 9, 8, generator))


def assert_equal(one: ImageDraws, other: ImageDraws) -> None:
    assert torch.equal(one.order, other.order)
    for a, b in zip(one.drawn, other.drawn, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("strategy", ["none", "flip", "color_cutout", "color_crop_cutout_flip_scale_rotate"])
def test_parts_hold_the_rows_of_the_whole(strategy):
    whole = draws(strategy)
    assert len(whole.tensors()) == 1 + sum(field is not None for field in whole.drawn)
    start = 0
    for size, part in zip((4, 0, 5), whole.split((4, 0, 5)), strict=True):
        rows = ImageDraws(whole.order[start : start + size], whole.drawn.rows(start, start + size))
        assert_equal(part, rows)
        assert_equal(whole.select(torch.arange(start, start + size)), rows)
        start += size
    assert whole.to(torch.device("cpu")).order is whole.order


def test_an_index_lies_on_the_device_of_the_images():
    pixels = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    lazy, meta = LazyImages(fit_normaliser(pixels), pixels, "cpu"), torch.device("meta")
    assert index_device(lazy) == index_device(pixels) == torch.device("cpu")
    assert index_device(torch.zeros(6, 1, 4, 4, device=meta)) == meta
    subset = ImageSubset(torch.zeros(6, 1, 4, 4, device=meta), torch.tensor([4, 2]))
    assert index_device(subset) == subset.index.device == meta
    assert subset[torch.tensor([0])].is_meta
    assert first_image(subset).shape == (1, 1, 4, 4)
    assert torch.equal(ImageSubset(lazy, torch.tensor([4, 2]))[torch.tensor([1])], lazy[torch.tensor([2])])
