"""Common parts of all pictures: colours, cells for images, PNG files, and a guard for errors."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tadperf.files import write_bytes
from tadperf.report.text import Colour

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

BACKGROUND: Colour = (255, 255, 255)
INK: Colour = (20, 20, 20)
FAINT: Colour = (110, 110, 110)
MARGIN = 12  # pixels
MEGAPIXELS = 12  # about the size of the largest picture
MAX_NAME = 240  # pixels of the longest class name next to a row

logger = logging.getLogger(__name__)


def save_safely(save: Callable[..., None], path: Path | str, *values: Any) -> bool:
    """Calls save(path, *values). If that fails, logs one warning with the reason and returns False.

    A run must not end because one of its pictures cannot be drawn or written.
    """
    try:
        save(path, *values)
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        logger.warning("%s was not written: %s: %s", Path(path).name, type(error).__name__, reason)
        return False
    return True


def save_png(path: Path | str, picture: Image) -> None:
    """Writes a PNG file atomically."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def to_drawable(pixels: Tensor) -> np.ndarray:
    """Converts uint8 [M, C, H, W] to uint8 [M, H, W, 3], or to the mean over channels [M, H, W] if C is not 3."""
    pixels = pixels.cpu()
    if pixels.shape[1] == 3:
        return pixels.permute(0, 2, 3, 1).contiguous().numpy()
    return pixels.float().mean(1).round().byte().numpy()


def cell_size(height: int, width: int, smallest: int, largest: int) -> tuple[int, int]:
    """Returns height and width of a drawn image; the longer side is between `smallest` and about `largest` pixels.

    Small images are enlarged by a whole number, large ones are reduced.
    """
    longer = max(height, width)
    if longer < smallest:
        scale = -(-smallest // longer)
        return height * scale, width * scale
    ratio = min(1.0, largest / longer)
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def paste(picture: Image, image: np.ndarray, position: tuple[int, int], size: tuple[int, int]) -> None:
    """Draws an image uint8 [H, W] or [H, W, 3] at (x, y) in a cell of (height, width) pixels."""
    from PIL import Image

    cell = Image.fromarray(image)
    if (cell.height, cell.width) != size:
        enlarge = size[0] >= cell.height
        cell = cell.resize((size[1], size[0]), Image.Resampling.NEAREST if enlarge else Image.Resampling.BOX)
    picture.paste(cell, position)
