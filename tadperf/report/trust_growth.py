"""The verdicts of all rounds as one picture: a bar for each class and round, divided by verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tadperf.report.drawing import BACKGROUND, FAINT, INK, MARGIN, MAX_NAME, save_png
from tadperf.report.text import draw_text, drawable_names, widest

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

    from tadperf.trust.state import TrustState

COLOURS = {
    "trusted": (27, 94, 150),
    "recalled": (78, 171, 129),
    "relabelled": (240, 173, 64),
    "untrusted": (214, 214, 214),
}
BAR, LENGTH = 12, 640  # pixels: height of a bar, width of the longest bar
GAP = 9  # pixels between classes
HEAD = 64  # pixels: three lines above the bars
MAX_CLASSES = 40  # classes with their own row; the others share one more row
MAX_ROUNDS = 50  # only the last rounds are drawn


def save_trust_growth(path: Path | str, rounds: Sequence[TrustState]) -> None:
    """Writes the picture of `draw_trust_growth` as a PNG file, atomically."""
    save_png(path, draw_trust_growth(rounds))


def draw_trust_growth(rounds: Sequence[TrustState]) -> Image:
    """Draws the samples by given class (rows), round (bars, the first on top) and verdict (colours) (tadperf).

    Raises ValueError if there is no round.
    """
    from PIL import Image, ImageDraw

    if not rounds:
        raise ValueError("rounds: none: must be one state or more")
    rounds = rounds[-MAX_ROUNDS:]
    rows, note = class_counts(rounds)
    name_width = widest((name for name, _ in rows), 14, MAX_NAME) + MARGIN
    longest = max(1, *(sum(counts.values()) for _, bars in rows for counts in bars))
    step = len(rounds) * (BAR + 1) + GAP
    width = max(3 * MARGIN + name_width + LENGTH + 60, 720)
    picture = Image.new("RGB", (width, MARGIN + HEAD + len(rows) * step + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    order = f", {len(rounds)} rounds from top to bottom" if len(rounds) > 1 else ""
    title = f"Samples of each given class by verdict{order}"
    draw_text(draw, (MARGIN, MARGIN), title, 16, INK, width=width - 2 * MARGIN)
    _draw_legend(draw, rows, note, width)
    for row, (name, bars) in enumerate(rows):
        y = MARGIN + HEAD + row * step
        draw_text(draw, (name_width, y + (step - GAP) // 2), name, 14, INK, "rm", MAX_NAME)
        for counts in bars:
            _draw_bar(draw, (MARGIN + name_width, y), counts, longest)
            y += BAR + 1
    return picture


def _draw_legend(draw: ImageDraw, rows: list[tuple[str, list[dict[str, int]]]], note: str, width: int) -> None:
    """Draws the colours that appear in a bar, and explains the percentages."""
    x, y = MARGIN, MARGIN + 24
    for verdict, colour in COLOURS.items():
        if any(counts[verdict] for _, bars in rows for counts in bars):
            draw.rectangle((x, y, x + BAR, y + BAR), colour)
            x += BAR + 20 + int(draw_text(draw, (x + BAR + 5, y - 2), verdict, 14, INK))
    text = "percentages: share of the class used for training (all but untrusted)"
    draw_text(draw, (MARGIN, y + 18), f"{text};  {note}" if note else text, 12, FAINT, width=width - 2 * MARGIN)


def _draw_bar(draw: ImageDraw, position: tuple[int, int], counts: dict[str, int], longest: int) -> None:
    """Draws one bar and the share of the samples used for training."""
    x, y = position
    total = sum(counts.values())
    start = 0
    for verdict, colour in COLOURS.items():
        end = start + counts[verdict]
        left, right = x + start * LENGTH // longest, x + end * LENGTH // longest - 1
        if right >= left:  # a few samples of a large class can be less than a pixel
            draw.rectangle((left, y, right, y + BAR - 1), colour)
        start = end
    text = f"{(total - counts['untrusted']) / total:.0%}" if total else "no sample"
    draw_text(draw, (x + total * LENGTH // longest + 6, y - 1), text, 11, FAINT)


def class_counts(rounds: Sequence[TrustState]) -> tuple[list[tuple[str, list[dict[str, int]]]], str]:
    """Returns each row's name and, for each round, its samples by verdict; and a note about the names."""
    counts = [state.counts() for state in rounds]
    total = len(rounds[0].class_names)
    names = drawable_names(rounds[0].class_names[:MAX_CLASSES])
    rows = [
        (name, [{verdict: by_class[c] for verdict, by_class in count.items()} for count in counts])
        for c, name in enumerate(names.texts)
    ]
    if total > MAX_CLASSES:
        others = [{verdict: sum(by_class[MAX_CLASSES:]) for verdict, by_class in count.items()} for count in counts]
        rows.append((f"{total - MAX_CLASSES} more", others))
    return rows, names.note
