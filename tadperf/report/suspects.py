"""The most suspicious labels as one picture: each image with the label it was given and the one suggested."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from tadperf.files import write_bytes
from tadperf.report.grid import BACKGROUND, FAINT, INK, MARGIN, to_drawable

if TYPE_CHECKING:
    from PIL.Image import Image

    from tadperf.data.dataset import Dataset
    from tadperf.trust.state import TrustState

SHOWN, COLUMNS = 40, 8
CELL = 112  # pixels of the longer side, at least
CAPTION = 34  # pixels below an image: two lines of text


def save_suspects(path: Path | str, dataset: Dataset, state: TrustState) -> None:
    """Writes `suspects` as a PNG file, atomically."""
    buffer = io.BytesIO()
    draw_suspects(dataset, state).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def draw_suspects(dataset: Dataset, state: TrustState) -> Image:
    """The 40 labels held wrong with the highest score, worst first: the given label, struck, over the suggested one."""
    from PIL import Image, ImageDraw, ImageFont

    order = state.worst()
    worst = order[state.issues[order]][:SHOWN]
    pixels = to_drawable(dataset.images[worst])
    _, height, width = dataset.shape
    scale = max(1, CELL // max(height, width))
    cell_x, cell_y = max(width * scale, CELL) + MARGIN, height * scale + CAPTION + MARGIN
    rows = max(1, -(-len(worst) // COLUMNS))
    font, top = ImageFont.load_default(13), 2 * MARGIN + 16
    picture = Image.new("RGB", (MARGIN + COLUMNS * cell_x, top + rows * cell_y), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    headline = f"{dataset.name}   {int(state.issues.sum())} of {len(state)} labels held wrong   the {len(worst)} worst"
    draw.text((MARGIN, MARGIN), headline, FAINT, ImageFont.load_default(16))
    for place, (sample, image) in enumerate(zip(worst.tolist(), pixels, strict=True)):
        x, y = MARGIN + place % COLUMNS * cell_x, top + place // COLUMNS * cell_y
        large = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        picture.paste(large, (x, y))
        given, better = (state.class_names[int(labels[sample])] for labels in (state.given, state.suggested))
        y += height * scale + 2
        text = shorten_text(given, cell_x - MARGIN, font)
        draw.text((x, y), text, FAINT, font)
        draw.line((x, y + 9, x + font.getlength(text), y + 9), FAINT)
        draw.text((x, y + 15), shorten_text(f"{better}?", cell_x - MARGIN, font), INK, font)
    return picture


def shorten_text(text: str, width: float, font) -> str:
    """The text, or as much of its beginning as fits into `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
