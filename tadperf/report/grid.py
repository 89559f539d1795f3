"""The distilled images as one picture: a row for each class, a column for each image of it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from tadperf.files import write_bytes

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from tadperf.artifact import DistilledSet

CELL = 48  # pixels that a small image is enlarged to, at least: an 8 x 8 digit is then well visible
WIDTH = 2400  # of the images of one row; wider ones are not enlarged
MEGAPIXELS = 12  # of the whole picture; beyond, only the first images of each class are shown
GAP = 2  # between images
MARGIN = 12
BACKGROUND, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)


def save_grid(path: Path | str, distilled: DistilledSet) -> None:
    """Writes `grid` as a PNG file, atomically."""
    buffer = io.BytesIO()
    draw_grid(distilled).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def draw_grid(distilled: DistilledSet) -> Image:
    """A picture of the set: a headline, then one row per class with its name; nearest-neighbour enlarged (tadperf)."""
    from PIL import Image, ImageDraw, ImageFont

    pixels, labels = to_drawable(distilled.pixels()), distilled.hard_labels.numpy()
    rows = [pixels[labels == label] for label in range(distilled.num_classes)]
    _, height, width = distilled.shape
    longest = max(1, *(len(row) for row in rows))
    scale = max(1, min(-(-CELL // max(height, width)), WIDTH // (longest * width)))
    step_x, step_y = width * scale + GAP, height * scale + GAP
    shown = max(1, min(longest, int(MEGAPIXELS * 1e6 / (step_x * step_y * len(rows)))))

    font = ImageFont.load_default(max(10, min(16, step_y - 2)))
    headline = _headline(distilled, shown, longest)
    label_width = int(max(font.getlength(name) for name in distilled.class_names)) + MARGIN
    top = 2 * MARGIN + 16
    full_width = 2 * MARGIN + max(label_width + shown * step_x, int(ImageFont.load_default(16).getlength(headline)))
    picture = Image.new("RGB", (full_width, top + len(rows) * step_y + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), headline, FAINT, ImageFont.load_default(16))
    for label, (name, row) in enumerate(zip(distilled.class_names, rows, strict=True)):
        y = top + label * step_y
        draw.text((MARGIN + label_width - MARGIN, y + (step_y - GAP) // 2), name, INK, font, anchor="rm")
        for column, image in enumerate(row[:shown]):
            large = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            picture.paste(large, (MARGIN + label_width + column * step_x, y))
    return picture


def _headline(distilled: DistilledSet, shown: int, longest: int) -> str:
    every = f"{longest} image{'s' if longest > 1 else ''} each"
    count = every if shown == longest else f"{shown} of {longest} images each"
    name, method = distilled.data.get("name", ""), distilled.config.get("match", {}).get("method", "")
    parts = [name, f"{distilled.num_classes} classes, {count}", method, f"seed {distilled.seed}"]
    return "   ".join(part for part in parts if part)


def to_drawable(pixels: Tensor) -> np.ndarray:
    """uint8 [M, H, W, 3], or [M, H, W] where there are not three channels: then their mean."""
    if pixels.shape[1] == 3:
        return pixels.permute(0, 2, 3, 1).contiguous().numpy()
    return pixels.float().mean(1).round().byte().numpy()
