"""Images before and after refinement, each with the detector's verdict, as one picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from tadperf.files import write_bytes
from tadperf.report.grid import BACKGROUND, CELL, FAINT, INK, MARGIN, MEGAPIXELS, to_drawable

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

WRONG, UNSURE = (190, 30, 30), (190, 120, 0)  # taken for another class; right, but with less confidence than beta
CAPTION, GAP, HEAD = 14, 6, 22  # pixels: below an image, between images, above a panel
MOST = 24  # images of a class that are shown


def save_refined(
    path: Path | str,
    images: tuple[Tensor, Tensor],
    labels: Tensor,
    logits: tuple[Tensor, Tensor],
    class_names: tuple[str, ...],
    beta: float,
) -> None:
    """Writes `refined` as a PNG file, atomically."""
    buffer = io.BytesIO()
    draw_refined(images, labels, logits, class_names, beta).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def draw_refined(
    images: tuple[Tensor, Tensor],
    labels: Tensor,
    logits: tuple[Tensor, Tensor],
    class_names: tuple[str, ...],
    beta: float,
) -> Image:
    """Two panels, before and after: a row per class; below each image what it is taken for and with what confidence.

    images: uint8 [M, C, H, W] each; labels: int64 [M], the classes they are meant to show; logits: float [M, K] each.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows = [(labels == label).nonzero()[:, 0] for label in range(len(class_names))]
    _, height, width = images[0].shape[1:]
    scale = max(1, -(-CELL // max(height, width)))
    step_x, step_y = max(width * scale, CELL) + GAP, height * scale + CAPTION + GAP
    longest = max(len(row) for row in rows)
    shown = max(1, min(longest, MOST, int(MEGAPIXELS * 1e6 / (2 * step_x * step_y * len(rows)))))
    font = ImageFont.load_default(11)
    left = int(max(font.getlength(name) for name in class_names)) + 2 * MARGIN
    panel = shown * step_x + 2 * MARGIN
    picture = Image.new("RGB", (left + 2 * panel, HEAD + 2 * MARGIN + len(rows) * step_y), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for side, (title, made, said) in enumerate(zip(("before", "after"), images, logits, strict=True)):
        confidence, taken_for = said.double().cpu().softmax(1).max(1)
        pixels, x0 = to_drawable(made.cpu()), left + side * panel
        flagged = (taken_for != labels) | ~(confidence >= beta)
        headline = f"{title}: {int(flagged.sum())} of {len(labels)} anomalous, beta {beta:g}"
        draw.text((x0, MARGIN), headline, FAINT, ImageFont.load_default(14))
        for label, row in enumerate(rows):
            y = MARGIN + HEAD + label * step_y
            if side == 0:
                draw.text((left - MARGIN, y + height * scale // 2), class_names[label], INK, font, anchor="rm")
            for column, place in enumerate(row[:shown].tolist()):
                x, other = x0 + column * step_x, int(taken_for[place])
                large = Image.fromarray(pixels[place]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
                picture.paste(large, (x, y))
                ink = WRONG if other != label else UNSURE if flagged[place] else FAINT
                text = f"{class_names[other][:6]}  {float(confidence[place]):.2f}"
                draw.text((x, y + height * scale + 1), text, ink, font)
    return picture
