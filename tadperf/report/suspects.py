"""The most suspicious labels as one picture: each image with its given label, its suggested label and its file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tadperf.report.drawing import BACKGROUND, FAINT, INK, MARGIN, cell_size, paste, save_png, to_drawable
from tadperf.report.text import draw_text, drawable_names, keep_end

if TYPE_CHECKING:
    from PIL.Image import Image

    from tadperf.data.dataset import Dataset
    from tadperf.trust.state import TrustState

MAX_SHOWN, COLUMNS = 40, 8
CELL = 112  # approximate pixels of an image's longer side
CAPTION = 48  # pixels below an image: three lines of text
FONT, SMALL, HEADLINE, HEAD = 13, 10, 16, 44  # pixels: captions, places, headline, and both lines above the images


def save_suspects(path: Path | str, dataset: Dataset, state: TrustState) -> None:
    """Writes the picture of `draw_suspects` as a PNG file, atomically."""
    save_png(path, draw_suspects(dataset, state))


def draw_suspects(dataset: Dataset, state: TrustState) -> Image:
    """Draws the 40 suspected label errors with the highest score, with their labels and files.

    The last line of a caption is the file, or the row of a set without file names. Long paths keep their end.
    """
    from PIL import Image, ImageDraw

    order = state.worst()
    worst = order[state.issues[order]][:MAX_SHOWN]
    images = to_drawable(dataset.images[worst])
    height, width = cell_size(*dataset.shape[1:], CELL, CELL)
    cell_x, cell_y = max(width, CELL) + MARGIN, height + CAPTION + MARGIN
    rows = max(1, -(-len(worst) // COLUMNS))
    picture = Image.new("RGB", (MARGIN + COLUMNS * cell_x, MARGIN + HEAD + rows * cell_y), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    names = drawable_names(state.class_names)
    issues, most = int(state.issues.sum()), f", the {len(worst)} most suspicious" if len(worst) else ""
    headline = f"{dataset.name}: {issues} of {len(state)} labels are suspected errors{most}"
    draw_text(draw, (MARGIN, MARGIN), headline, HEADLINE, INK, width=picture.width - 2 * MARGIN)
    legend = "struck out: given label;  with a question mark: suggested label"
    legend = f"{legend};  {names.note}" if names.note else legend
    if len(worst):
        draw_text(draw, (MARGIN, MARGIN + 20), legend, FONT, FAINT, width=picture.width - 2 * MARGIN)
    for cell, (sample, image) in enumerate(zip(worst.tolist(), images, strict=True)):
        x, y = MARGIN + cell % COLUMNS * cell_x, MARGIN + HEAD + cell // COLUMNS * cell_y
        paste(picture, image, (x, y), (height, width))
        given, suggested = (names.texts[int(labels[sample])] for labels in (state.given, state.suggested))
        y += height + 2
        length = draw_text(draw, (x, y), given, FONT, FAINT, width=cell_x - MARGIN)
        draw.line((x, y + 9, x + length, y + 9), FAINT)
        draw_text(draw, (x, y + 15), f"{suggested}?", FONT, INK, width=cell_x - MARGIN)
        place = f"row {sample}" if dataset.file_names is None else dataset.file_names[sample]
        draw_text(draw, (x, y + 31), keep_end(place, SMALL, cell_x - MARGIN), SMALL, FAINT)
    return picture
