"""The picture of a refinement shows every image before and after, and marks the anomalous ones."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from tadperf.report.drawing import MARGIN
from tadperf.report.refined import CELL, HEAD, draw_refined, save_refined


def marks(picture: np.ndarray) -> tuple[bool, bool]:
    """Returns whether the picture has red text (another class) and orange text (low confidence); edges are lighter."""
    red, green, blue = picture.astype(int).transpose(2, 0, 1)
    return bool((red - green > 100).any()), bool((green - blue > 60).any())


def test_both_panels_show_every_image_with_its_prediction(tmp_path):
    generator = torch.Generator().manual_seed(0)
    before = torch.randint(0, 255, (4, 1, 8, 8), dtype=torch.uint8, generator=generator)
    after = before.clone()
    after[1:3] = 255 - before[1:3]
    labels = torch.tensor([0, 0, 1, 1])
    first = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.1, 0.9]]).log()  # sure, unsure, mistaken, sure
    last = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]]).log()
    names = ("ant", "bee")
    save_refined(tmp_path / "r.png", (before, after), labels, (first, last), names, 0.7)
    picture = np.asarray(Image.open(tmp_path / "r.png"))

    def places(image: torch.Tensor) -> list[int]:
        large = image[0].numpy().repeat(6, 0).repeat(6, 1)
        grey, corner = picture[:, :, 0], large[0, 0]
        rows, columns = np.nonzero(grey[: -CELL + 1, : -CELL + 1] == corner)
        return [
            int(x)
            for y, x in zip(rows, columns, strict=True)
            if np.array_equal(grey[y : y + CELL, x : x + CELL], large)
        ]

    lefts = [places(image) for image in before]
    assert [len(positions) for positions in lefts] == [2, 1, 1, 2]
    assert all(len(places(image)) == 1 for image in after[1:3])
    assert lefts[0][1] - lefts[0][0] == places(after[1])[0] - lefts[1][0]  # the same column in the other panel
    middle = lefts[0][1] - 10
    rows = picture[MARGIN + HEAD :]  # without the legend
    assert marks(rows[:, :middle]) == (True, True)
    assert marks(rows[:, middle:]) == (False, False)


def test_the_picture_of_a_large_set_has_a_limited_size():
    labels = torch.arange(100 * 50) % 100
    images = torch.zeros(100 * 50, 3, 32, 32, dtype=torch.uint8)
    logits = torch.zeros(100 * 50, 100)
    picture = draw_refined((images, images), labels, (logits, logits), tuple(map(str, range(100))), 0.5)
    assert picture.width * picture.height < 2e7
