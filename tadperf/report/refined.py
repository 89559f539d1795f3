"""Images before and after refinement, with the detector's prediction for each, as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tadperf.report.drawing import (
    BACKGROUND,
    FAINT,
    INK,
    MARGIN,
    MAX_NAME,
    MEGAPIXELS,
    cell_size,
    paste,
    save_png,
    to_drawable,
)
from tadperf.report.text import draw_text, drawable_names, widest

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from torch import Tensor

WRONG, UNSURE = (190, 30, 30), (190, 120, 0)  # predicted as another class; right class, confidence below beta
CELL, MAX_CELL = 48, 160  # pixels to which a small image is enlarged and a large one reduced
CAPTION, GAP, HEAD = 14, 6, 58  # pixels: below an image, between images, above the panels
MAX_SHOWN = 24  # largest number of images per class
MAX_ROWS = 500  # largest number of classes
FONT = 11


def save_refined(
    path: Path | str,
    images: tuple[Tensor, Tensor],
    labels: Tensor,
    logits: tuple[Tensor, Tensor],
    class_names: tuple[str, ...],
    beta: float,
) -> None:
    """Writes the picture of `draw_refined` as a PNG file, atomically."""
    save_png(path, draw_refined(images, labels, logits, class_names, beta))


def draw_refined(
    images: tuple[Tensor, Tensor],
    labels: Tensor,
    logits: tuple[Tensor, Tensor],
    class_names: tuple[str, ...],
    beta: float,
) -> Image:
    """Draws two panels, before and after, with a row for each class.

    The caption of an image is the confidence, and the predicted class if it is another one.
    images: uint8 [M, C, H, W] each. labels: int64 [M], the classes that the images should show. logits: float [M, K]
    each.
    """
    from PIL import Image, ImageDraw

    classes = min(len(class_names), MAX_ROWS)
    rows = [(labels == label).nonzero()[:, 0] for label in range(classes)]
    largest = min(MAX_CELL, int((MEGAPIXELS * 1e6 / 2 / classes) ** 0.5))
    height, width = cell_size(images[0].shape[2], images[0].shape[3], CELL, largest)
    step_x, step_y = max(width, CELL) + GAP, height + CAPTION + GAP
    longest = max(1, *(len(row) for row in rows))
    columns = max(1, min(longest, MAX_SHOWN, int(MEGAPIXELS * 1e6 / (2 * step_x * step_y * classes))))
    names = drawable_names(class_names)
    left = widest(names.texts[:classes], FONT, MAX_NAME) + 2 * MARGIN
    panel = max(columns * step_x + 2 * MARGIN, 280)
    picture = Image.new("RGB", (left + 2 * panel, HEAD + 2 * MARGIN + classes * step_y), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    top = MARGIN + HEAD
    for label, name in enumerate(names.texts[:classes]):
        draw_text(draw, (left - MARGIN, top + label * step_y + height // 2), name, FONT, INK, "rm", MAX_NAME)
    colours = set()
    for side, title in enumerate(("before", "after")):
        confidence, predicted = logits[side].double().cpu().softmax(1).max(1)
        pixels, x0 = to_drawable(images[side]), left + side * panel
        marked = (predicted != labels) | ~(confidence >= beta)
        headline = f"{title}: {int(marked.sum())} of {len(labels)} images anomalous"
        draw_text(draw, (x0, MARGIN), headline, 14, INK, width=panel - MARGIN)
        for label, row in enumerate(rows):
            for column, place in enumerate(row[:columns].tolist()):
                x, y, other = x0 + column * step_x, top + label * step_y, int(predicted[place])
                paste(picture, pixels[place], (x, y), (height, width))
                colour = WRONG if other != label else UNSURE if marked[place] else FAINT
                colours.add(colour)
                caption = f"{float(confidence[place]):.2f}" + (f" {names.texts[other]}" if other != label else "")
                draw_text(draw, (x, y + height + 1), caption, FONT, colour, width=step_x - GAP)
    _draw_legend(draw, (left, MARGIN + 20), colours, beta, names.note, 2 * panel - MARGIN)
    return picture


def _draw_legend(
    draw: ImageDraw, position: tuple[int, int], colours: set[tuple[int, int, int]], beta: float, note: str, width: int
) -> None:
    """Explains the captions and the colours that appear in the picture."""
    x, y = position
    meanings = {FAINT: "number: confidence", WRONG: "red: another class", UNSURE: f"orange: confidence below {beta:g}"}
    for colour, text in meanings.items():
        if colour == FAINT or colour in colours:
            x += int(draw_text(draw, (x, y), text, FONT, colour, width=max(0, position[0] + width - x))) + 16
    draw_text(draw, (position[0], y + 16), note, FONT, FAINT, width=width)
