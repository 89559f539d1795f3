"""Names as one line of text. For pictures: finds a font for every name, and shortens long ones."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

Colour = tuple[int, int, int]

FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
)
PREFERRED_FONTS = ("dejavusans.", "notosans-regular", "notosanscjk", "unifont", "wqy", "sourcehansans", "arialuni")
MAX_FONTS = 200  # largest number of font files to try; not tuned
MISSING = "\U0010ffff"  # no font has a glyph for this character
# Marks that change the direction of the text after them, also outside the name: in a table, the next columns.
REORDERING = dict.fromkeys(
    map(ord, "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"), "\ufffd"
)


class Names(NamedTuple):
    """Class names that can be drawn, and a note for the caption if some cannot ("" otherwise)."""

    texts: list[str]
    note: str


def drawable_names(names: Sequence[str]) -> Names:
    """Replaces names that no font of this machine can draw, and empty names, by "class 3"."""
    texts, replaced = [], 0
    for number, name in enumerate(names):
        text = clean_text(name)
        drawable = font_file(text) is not None
        texts.append(text if text and drawable else f"class {number}")
        replaced += not drawable
    note = f"{replaced} class name{'s' if replaced > 1 else ''} shown by number: no font here has the characters"
    return Names(texts, note if replaced else "")


def clean_text(text: str) -> str:
    """Returns the text in one line: control characters become spaces, invalid ones question marks."""
    categories = {"Cc": " ", "Cs": "?", "Cn": "?", "Zl": " ", "Zp": " "}
    return " ".join("".join(categories.get(unicodedata.category(letter), letter) for letter in text).split())


def one_line(name: object) -> str:
    """Returns a name in one line, with U+FFFD for each character that reorders the text around it."""
    return clean_text(str(name)).translate(REORDERING) or "(empty name)"


def draw_text(
    draw: ImageDraw,
    position: tuple[float, float],
    text: str,
    size: int,
    colour: Colour,
    anchor: str = "la",
    width: float = float("inf"),
) -> float:
    """Draws one line of text, shortened to `width` pixels; returns its width. anchor: see Pillow's text anchors."""
    text = shorten_text(clean_text(text), size, width)
    draw.text(position, text, colour, font_for(text, size), anchor=anchor)
    return text_width(text, size)


def shorten_text(text: str, size: int, width: float) -> str:
    """Returns the text, or as much of its beginning as fits into `width` pixels."""
    if text_width(text, size) <= width:
        return text
    low, high = 0, len(text)  # the first `low` letters fit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text_width(text[:middle] + "…", size) <= width else (low, middle - 1)
    return text[:low] + "…"


def keep_end(text: str, size: int, width: float) -> str:
    """Returns the text in one line, or as much of its end as fits into `width` pixels."""
    text = clean_text(text)
    if text_width(text, size) <= width:
        return text
    low, high = 0, len(text)  # the last `low` letters fit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text_width("…" + text[-middle:], size) <= width else (low, middle - 1)
    return "…" + text[len(text) - low :]


def text_width(text: str, size: int) -> float:
    """Returns the width of one line of text in pixels."""
    return font_for(text, size).getlength(text)


def widest(texts: Iterable[str], size: int, limit: float) -> int:
    """Returns the width in pixels of the widest text, at most `limit`."""
    return int(min(limit, max((text_width(text, size) for text in texts), default=0)))


def font_for(text: str, size: int) -> FreeTypeFont:
    """Returns the font that draws the text: Pillow's built-in one, else a font of this machine."""
    return load_font(font_file(text) or "", size)


@lru_cache(maxsize=64)
def load_font(file: str, size: int) -> FreeTypeFont:
    """Loads a font file; "" is Pillow's built-in font."""
    from PIL import ImageFont

    if file:
        return ImageFont.truetype(file, size)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as documented for calls with a size
    return font


@lru_cache(maxsize=4096)
def font_file(text: str) -> str | None:
    """Returns the first font with all characters of the text: "" for the built-in one, None if there is none."""
    letters = [letter for letter in dict.fromkeys(text) if unicodedata.category(letter) not in ("Zs", "Cf", "Mn")]
    return next((file for file in ("", *font_files()) if all(has_glyph(file, letter) for letter in letters)), None)


@cache
def font_files() -> tuple[str, ...]:
    """Returns the fonts of this machine and of matplotlib if it is installed, those with many characters first."""
    folders = [Path(os.path.expanduser(folder)) for folder in FONT_FOLDERS]  # works without a home, too
    matplotlib = find_spec("matplotlib")
    if matplotlib and matplotlib.origin:
        folders.append(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf")
    files = {file for folder in folders for ending in ("ttf", "otf", "ttc") for file in folder.rglob(f"*.{ending}")}

    def order(file: Path) -> tuple[bool, str]:
        return not file.name.lower().startswith(PREFERRED_FONTS), str(file)

    # The font LastResort draws a box with the name of the script instead of the character.
    usable = (file for file in files if not file.name.lower().startswith("lastresort"))
    return tuple(map(str, sorted(usable, key=order)[:MAX_FONTS]))


@lru_cache(maxsize=1 << 16)
def has_glyph(file: str, letter: str) -> bool:
    """Returns whether a font draws this character as something other than its sign for missing characters."""
    return _render(file, letter) not in (None, _missing_sign(file))


@cache
def _missing_sign(file: str) -> bytes | None:
    return _render(file, MISSING)


def _render(file: str, letter: str) -> bytes | None:
    """Returns the pixels of one character; None if the font is unusable, such as a colour font of fixed size."""
    from PIL import Image, ImageDraw

    try:
        picture = Image.new("L", (32, 32))
        ImageDraw.Draw(picture).text((8, 8), letter, 255, load_font(file, 13))
    except (OSError, ValueError):
        return None
    return picture.tobytes()
