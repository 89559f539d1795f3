"""Reads images with 16 bits in each of several channels. Pillow keeps only the high byte of each value.

Pillow decodes such an image by a "raw mode", which names the order of the two bytes of a value. With the other order it
keeps the low bytes. Two decodes together give the complete values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}  # N: the order of this machine


def read_words(image: Any, open_again: Callable[[], Any]) -> np.ndarray | None:
    """Returns the values of an image with 16 bits in each of several channels; None for every other image.

    open_again: opens the same image once more. Returns uint16 [H, W, C] with C = 2 (grey and alpha), 3 or 4.
    """
    modes = {_raw_mode(tile) for tile in image.tile}
    if modes == {"LA;16B"}:  # the four bytes of a pixel fit the four channels of 8 bits
        pixels = _decode(image, "RGBA").astype(np.uint16)
        return (pixels[..., 0::2] << 8) | pixels[..., 1::2]
    if len(modes) != 1 or (mode := modes.pop())[:-1] not in ("RGB;16", "RGBA;16") or mode[-1] not in SWAPPED:
        return None
    high = _decode(image, mode).astype(np.uint16)
    with open_again() as again:
        return (high << 8) | _decode(again, mode[:-1] + SWAPPED[mode[-1]])


def words_to_image(words: np.ndarray, bits: int, transparent: Any = None) -> Any:
    """Returns values of 0..2**bits [H, W, C] as a Pillow image with 8 bits per channel. bits: at least 8.

    The last of two or four channels is alpha, which always uses 16 bits. transparent: the colour that is transparent in
    an image without alpha, if there is one.
    """
    from PIL import Image

    colour, alpha = colour_channels(words), None
    if words.shape[2] in (2, 4):
        alpha = words[..., -1:] >> 8
    elif transparent is not None:
        alpha = np.where((words == np.asarray(transparent)).all(2, keepdims=True), 0, 255)
    channels = [(colour >> (bits - 8)).clip(0, 255), *([] if alpha is None else [alpha])]
    return Image.fromarray(np.concatenate(channels, 2).astype(np.uint8))


def colour_channels(words: np.ndarray) -> np.ndarray:
    """Returns the values without alpha."""
    return words[..., :-1] if words.shape[2] in (2, 4) else words


def _raw_mode(tile: Any) -> str:
    """Returns the raw mode of a tile; its arguments are the raw mode alone, or begin with it."""
    arguments = tile[3]
    mode = arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")
    return mode if isinstance(mode, str) else ""


def _decode(image: Any, raw_mode: str) -> np.ndarray:
    """Decodes an image that is not loaded yet, with another raw mode."""
    tiles = []
    for tile in image.tile:
        changed = raw_mode if isinstance(tile[3], str) else (raw_mode, *tile[3][1:])
        tiles.append(getattr(tile, "_make", tuple)((*tile[:3], changed)))  # a plain tuple in Pillow 10
    image.tile = tiles
    image.load()  # numpy hides the error of a damaged file
    return np.asarray(image)
