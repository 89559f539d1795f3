"""The distilled images as one picture: a row for each class, a column for each image of the class."""

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
from tadperf.report.text import draw_text, drawable_names, text_width, widest

if TYPE_CHECKING:
    from PIL.Image import Image

    from tadperf.artifact import DistilledSet

CELL = 48  # pixels to which a small image is enlarged: an 8 x 8 digit is then easy to see
MAX_CELL = 256  # pixels to which a large image is reduced
MAX_ROWS = 1000  # largest number of classes
WIDTH = 2400  # pixels; images are enlarged only up to this width of a row
GAP = 2  # pixels between images
HEADLINE = 16  # pixels of the headline's font


def save_grid(path: Path | str, distilled: DistilledSet) -> None:
    """Writes the picture of `draw_grid` as a PNG file, atomically."""
    save_png(path, draw_grid(distilled))


def draw_grid(distilled: DistilledSet) -> Image:
    """Draws a headline, then one row for each class with its name and its images (tadperf).

    If a picture would exceed about 12 megapixels, draws part of the set; the headline says so.
    """
    from PIL import Image, ImageDraw

    classes = min(distilled.num_classes, MAX_ROWS)
    pixels, labels = to_drawable(distilled.pixels()), distilled.hard_labels.numpy()
    rows = [pixels[labels == label] for label in range(classes)]
    longest = max(1, *(len(row) for row in rows))
    height, width = _cell(distilled, longest, classes)
    step_x, step_y = width + GAP, height + GAP
    columns = max(1, min(longest, int(MEGAPIXELS * 1e6 / (step_x * step_y * classes))))

    names = drawable_names(distilled.class_names[:classes])
    size = max(10, min(16, step_y - 2))
    headline = _headline(distilled, columns, longest, classes, names.note)
    name_width = widest(names.texts, size, MAX_NAME) + MARGIN
    top = 2 * MARGIN + HEADLINE
    full_width = 2 * MARGIN + max(name_width + columns * step_x, int(text_width(headline, HEADLINE)))
    picture = Image.new("RGB", (full_width, top + classes * step_y + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw_text(draw, (MARGIN, MARGIN), headline, HEADLINE, FAINT)
    for label, (name, row) in enumerate(zip(names.texts, rows, strict=True)):
        y = top + label * step_y
        draw_text(draw, (name_width, y + height // 2), name, size, INK, "rm", MAX_NAME)
        for column, image in enumerate(row[:columns]):
            paste(picture, image, (MARGIN + name_width + column * step_x, y), (height, width))
    return picture


def _cell(distilled: DistilledSet, longest: int, classes: int) -> tuple[int, int]:
    """Returns height and width of one image: enlarged if the row has room, reduced if one column is too large."""
    _, height, width = distilled.shape
    room = min(CELL, max(height, width) * max(1, WIDTH // (longest * width)))
    largest = min(MAX_CELL, int((MEGAPIXELS * 1e6 / classes) ** 0.5))
    return cell_size(height, width, room, largest)


def _headline(distilled: DistilledSet, columns: int, longest: int, classes: int, note: str) -> str:
    images = f"{longest} image{'s' if longest > 1 else ''} each"
    images = images if columns == longest else f"{columns} of {longest} images each"
    if distilled.stored is not None:
        images += f" (stored {distilled.stored.shape[2]} x {distilled.stored.shape[3]})"
    total = distilled.num_classes
    shown = f"{total} class{'es' if total > 1 else ''}" if classes == total else f"{classes} of {total} classes"
    name, method = distilled.data.get("name", ""), distilled.config.get("match", {}).get("method", "")
    parts = [shown, images, method, f"seed {distilled.seed}", note]
    return f"{name or 'distilled set'}: " + ", ".join(part for part in parts if part)
