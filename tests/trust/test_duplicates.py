"""Planted duplicates are found: exact copies and recompressed ones, in train and across the splits, but no mirror."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tadperf.trust.duplicates import THRESHOLD, describe_images, find_duplicates, find_leaks, hash_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(count: int, seed: int = 0, side: int = 32, channels: int = 3) -> Tensor:
    """Returns different smooth pictures: random grids of 6 x 6 colours, enlarged, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 6, 6, generator=generator)
    coarse = coarse.lerp(coarse.mean(1, keepdim=True), 0.8)  # as in photos, the channels differ less than the pixels
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noise = torch.randn(fine.shape, generator=generator) * 4
    return (fine * 255 + noise).clamp(0, 255).to(torch.uint8)


def recompressed(image: Tensor, quality: int = 60) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


def pairs(found) -> list[tuple[int, int, bool]]:
    return [(a, b, exact) for a, b, exact in zip(*(found[i].tolist() for i in (0, 1, 3)), strict=True)]


def test_planted_duplicates_in_train():
    images = pictures(60)
    images[50] = images[7]
    images[51] = recompressed(images[9])
    images[52] = images[11].flip(2)
    images[53] = images[7]
    found = find_duplicates(images)
    assert pairs(found) == [(7, 50, True), (7, 53, True), (9, 51, False)]
    assert found.similarity[:2].tolist() == [1, 1]
    assert THRESHOLD <= float(found.similarity[2]) < 1
    assert not torch.equal(images[9], images[51])


def test_planted_leaks():
    images, test = pictures(40), pictures(20, seed=1)
    test[3], test[4], test[5] = images[30], recompressed(images[31]), images[32].flip(2)
    assert pairs(find_leaks(images, test)) == [(30, 3, True), (31, 4, False)]


def test_many_copies_do_not_hide_another_neighbour():
    images = pictures(40)
    images[10:30] = images[5]
    images[35] = recompressed(images[5])
    found = pairs(find_duplicates(images))
    assert found[:20] == [(5, k, True) for k in range(10, 30)]
    assert found[20:] == [(5, 35, False)]


def test_flat_images_are_duplicates_only_if_they_are_equal():
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    images[1], images[2] = 100, 101
    images[3:] = pictures(3, side=8, channels=1)
    images[4] = 100
    assert pairs(find_duplicates(images)) == [(1, 4, True)]
    assert describe_images(images[:3]).abs().sum() == 0


def test_two_blue_images_are_no_duplicates():
    """Their channels differ in the same way, so the cosine of all pixels is high. Their pictures differ."""
    images = pictures(4) // 16 + torch.tensor([40, 100, 180], dtype=torch.uint8).view(1, 3, 1, 1)
    z = describe_images(images)
    assert float((z[0] * z[1]).sum()) > THRESHOLD
    assert pairs(find_duplicates(images)) == []
    assert pairs(find_leaks(images[:2], images[2:])) == []
    images[3] = images[1] + 1
    assert pairs(find_duplicates(images)) == [(1, 3, False)]


def test_features_of_the_user_find_what_pixels_do_not():
    images = pictures(12)
    features = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    features[8] = features[2] * 3 + 0.01
    assert pairs(find_duplicates(images)) == []
    assert pairs(find_duplicates(images, features)) == [(2, 8, False)]
    assert pairs(find_duplicates(None, features)) == [(2, 8, False)]
    features[9] = features[1]
    assert pairs(find_duplicates(None, features.half()))[0] == (1, 9, True)
    with pytest.raises(ValueError, match="both are None"):
        find_duplicates(None)


def test_small_sets_and_equal_hashes():
    assert pairs(find_duplicates(pictures(1))) == []
    assert pairs(find_duplicates(pictures(1).repeat(3, 1, 1, 1))) == [(0, 1, True), (0, 2, True)]
    rows = torch.arange(5000).unsqueeze(1) % 4999
    codes = hash_rows(rows)
    assert len(set(codes)) == 4999
    assert codes[0] == codes[4999]
