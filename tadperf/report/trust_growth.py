"""How the trusted space grew: one bar for each class and round, cut by verdict, as one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tadperf.files import write_bytes
from tadperf.report.grid import BACKGROUND, FAINT, INK, MARGIN

if TYPE_CHECKING:
    from PIL.Image import Image

    from tadperf.trust.state import TrustState

COLOURS = {
    "trusted": (27, 94, 150),
    "recalled": (78, 171, 129),
    "relabelled": (240, 173, 64),
    "untrusted": (214, 214, 214),
}
BAR, GAP, LENGTH = 12, 3, 640
CLASSES = 40  # drawn at most; the rest is one more row


def save_trust_growth(path: Path | str, rounds: Sequence[TrustState]) -> None:
    """Writes `growth` as a PNG file, atomically."""
    buffer = io.BytesIO()
    draw_trust_growth(rounds).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def draw_trust_growth(rounds: Sequence[TrustState]) -> Image:
    """Samples by given class (rows), round (bars of a row, the first on top) and verdict (colours) (tadperf)."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(14)
    rows = _rows(rounds)
    label_width = int(max(font.getlength(name) for name in rows)) + MARGIN
    most = max(sum(verdicts.values()) for bars in rows.values() for verdicts in bars)
    step = len(rounds) * (BAR + 1) + GAP + 6
    top = 2 * MARGIN + 20
    picture = Image.new("RGB", (3 * MARGIN + label_width + LENGTH + 60, top + len(rows) * step + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    x = MARGIN
    for verdict, colour in COLOURS.items():
        draw.rectangle((x, MARGIN + 2, x + BAR, MARGIN + 2 + BAR), colour)
        draw.text((x + BAR + 5, MARGIN), verdict, INK, font)
        x += BAR + 20 + int(font.getlength(verdict))
    for row, (name, bars) in enumerate(rows.items()):
        y = top + row * step
        draw.text((MARGIN + label_width - MARGIN, y + (step - GAP) // 2 - 2), name, INK, font, anchor="rm")
        for verdicts in bars:
            x, done = MARGIN + label_width, 0
            for verdict, colour in COLOURS.items():
                start, done = done, done + verdicts[verdict]
                if done > start:
                    draw.rectangle((x + start * LENGTH // most, y, x + done * LENGTH // most - 1, y + BAR - 1), colour)
            inside = done - verdicts["untrusted"]
            draw.text(
                (x + done * LENGTH // most + 6, y - 1),
                f"{inside / max(done, 1):.0%}",
                FAINT,
                ImageFont.load_default(11),
            )
            y += BAR + 1
    return picture


def _rows(rounds: Sequence[TrustState]) -> dict[str, list[dict[str, int]]]:
    """By class, and by round in it, the number of samples of each verdict."""
    counts = [state.counts() for state in rounds]
    names = rounds[0].class_names
    rows = {
        name: [{verdict: by_class[c] for verdict, by_class in count.items()} for count in counts]
        for c, name in enumerate(names[:CLASSES])
    }
    if len(names) > CLASSES:
        rows[f"{len(names) - CLASSES} more"] = [
            {verdict: sum(by_class[CLASSES:]) for verdict, by_class in count.items()} for count in counts
        ]
    return rows
