"""The picture of a distilled set shows every image, enlarged, in the row of its class."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tadperf.artifact import DistilledSet
from tadperf.config import NetConfig
from tadperf.data.normalise import Normaliser
from tadperf.nets.training import Recipe
from tadperf.report.drawing import MARGIN, MEGAPIXELS
from tadperf.report.grid import CELL, GAP, draw_grid, save_grid


def distilled(pixels: torch.Tensor, labels: torch.Tensor, classes: int) -> DistilledSet:
    channels = pixels.shape[1]
    normaliser = Normaliser(torch.zeros(channels), torch.ones(channels))
    return DistilledSet(
        normaliser(pixels),
        labels,
        0.01,
        tuple(f"class {c}" for c in range(classes)),
        normaliser,
        "none",
        NetConfig.model_validate({}),
        Recipe(1, 1, 0.1, 0.0, 0.0, "none"),
        {},
        0,
        {},
        {"name": "made up"},
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_in_the_row_of_its_class(tmp_path, channels):
    pixels = torch.randint(0, 256, (6, channels, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([2, 0, 1, 1, 0, 2])
    save_grid(tmp_path / "g.png", distilled(pixels, labels, 3))
    picture = np.asarray(Image.open(tmp_path / "g.png"))
    side, step = CELL, CELL + GAP  # 8 x 6
    top = picture.shape[0] - MARGIN - 3 * step
    left = set()
    for label, column, index in ((0, 0, 1), (0, 1, 4), (1, 0, 2), (1, 1, 3), (2, 0, 0), (2, 1, 5)):
        image = pixels[index].permute(1, 2, 0).expand(-1, -1, 3).numpy().repeat(6, 0).repeat(6, 1)
        band = picture[top + label * step : top + label * step + side]
        (place,) = (x for x in range(picture.shape[1] - side) if np.array_equal(band[:, x : x + side], image))
        left.add(place - column * step)
    assert len(left) == 1  # all rows start at the same x


def test_the_picture_of_a_large_set_has_a_limited_size():
    labels = torch.arange(200 * 20) % 200
    picture = draw_grid(distilled(torch.zeros(200 * 20, 1, 32, 32, dtype=torch.uint8), labels, 200))
    assert picture.width * picture.height < 1.2 * MEGAPIXELS * 1e6


def test_the_headline_says_that_images_are_stored_small(monkeypatch):
    written: list[str] = []
    monkeypatch.setattr("tadperf.report.grid.draw_text", lambda draw, place, text, *_: written.append(text))
    full = distilled(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), 2)
    draw_grid(full)
    assert written[0] == "made up: 2 classes, 2 images each, seed 0"
    written.clear()
    draw_grid(replace(full, stored=torch.zeros(4, 1, 4, 4)))
    assert written[0] == "made up: 2 classes, 2 images each (stored 4 x 4), seed 0"
