"""Decodes image files with Pillow to one uint8 tensor."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tadperf.data import mapped
from tadperf.data.dataset import BrokenImage
from tadperf.data.deep_images import colour_channels, read_words, words_to_image
from tadperf.data.image_formats import FORMATS
from tadperf.data.parsing import is_lfs_pointer, reason
from tadperf.data.pixels import channels_first, fit_square
from tadperf.errors import DataWarning, UserError, warn_user
from tadperf.progress import Progress, silent

CHUNK = 1024  # encoded images in memory at a time; not tuned
BLOCK = 32  # images that a thread decodes in one task: on images of 32 x 32 a third faster than one by one
NAMED = 5  # an error names at most this many broken images
MAX_PIXELS = 178_956_970  # Pillow's own limit; an RGB image of this size takes 0.7 GB
# A damaged or hostile header can declare a huge image in a few bytes. Real images stay below these limits: a 1-bit PNG
# of one colour has 8240 pixels per byte.
FREE_PIXELS, MAX_PIXELS_PER_BYTE = 10_000_000, 10_000
GROUND = 128  # grey level behind transparent pixels: drawings in black and in white stay visible on it

DEEP_MODES = ("I", "F")  # the first letter of Pillow's modes with more than 8 bits in one channel: I;16, I;16B, I, F


class Encoded(NamedTuple):
    """An image before decoding: its name for messages, and its bytes or its file."""

    name: str
    data: bytes | Path


class BrokenImagesError(UserError):
    """Some images of a split cannot be decoded; `broken` lists all of them. large: the split would be mapped."""

    def __init__(self, broken: Sequence[BrokenImage], large: bool = False) -> None:
        self.broken, self.large = tuple(broken), large
        if len(broken) == 1:
            remedy = f"cannot be decoded ({broken[0].reason}); repair or remove it, or leave it out with --skip-broken"
            super().__init__("data", broken[0].name, remedy)
            return
        names = ", ".join(f"{image.name} ({image.reason})" for image in broken[:NAMED])
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        remedy = f"cannot be decoded: {names}{more}; repair or remove them, or leave them out with --skip-broken"
        super().__init__("data", f"{len(broken)} images", remedy)

    def __reduce__(self) -> tuple[Any, Any]:
        return type(self), (self.broken, self.large)


class BitDepth:
    """Returns the bits that the deep images (16-bit, 32-bit, float) of a set use. Computes them at the first call.

    All images of a set, in all its splits, are scaled by this one value: 12-bit data in 16-bit files keep their
    contrast, and the brightness of an image does not depend on the other pixels in it. 0 means floats in 0..1.
    """

    def __init__(self, images: Callable[[], Iterator[Encoded]]) -> None:
        self._images, self._lock, self._bits = images, threading.Lock(), -1

    def __call__(self) -> int:
        with self._lock:
            if self._bits < 0:
                self._bits = self._scan()
        return self._bits

    def _scan(self) -> int:
        bits = 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            images = self._images()
            while chunk := list(islice(images, CHUNK)):
                bits = max(bits, *pool.map(_bits_of_image, chunk))
        return bits


def decode(
    images: Iterator[Encoded],
    count: int,
    image_size: int | None,
    files: Sequence[Path],
    depth: BitDepth,
    progress: Progress = silent,
    key: str = "",
) -> Tensor:
    """Decodes `count` images to uint8 [N, C, H, W]. C is 1 if all images are grey, else 3.

    image_size: resizes each image, shorter side to this size, then centre crop.
    files: the files that the images come from. The mapped file of a large set is named after them and `key` (`mapped`).
    Transparent pixels show mid grey. Images with more than 8 bits per channel are scaled by one value for the set.
    Raises BrokenImagesError if images cannot be decoded, after it has tried all of them, and UserError on images of two
    sizes if no `image_size` is given.
    """
    name = mapped.cache_name(files, "decoded", image_size, count, *([key] if key else []))
    if (cached := mapped.cached_images(name)) is not None:
        return cached
    with _pillow_warnings():
        arrays = _decoded(images, image_size, depth)
        broken: list[BrokenImage] = []
        decoded = _decoded_only(arrays, broken)
        first = next(decoded, None)
        if first is None:
            raise BrokenImagesError(broken)
        size = first[1].shape[-2:]

        def fill(pixels: np.ndarray) -> int:
            colour, equal = False, True
            for done, (image, array) in enumerate(chain([first], decoded)):
                if array.shape[-2:] != size:
                    sizes = f"{_size(first[1])} ({first[0]}) and {_size(array)}"
                    raise UserError("data", image, f"images of two sizes, {sizes}; give --image-size to resize them")
                pixels[done] = array  # a grey image fills all three channels
                colour |= len(array) == 3
                equal = equal and np.array_equal(array, first[1])
                if done % CHUNK == 0 or done + 1 == count:
                    progress("decode", done + 1, count)
            if broken:
                raise BrokenImagesError(broken, mapped.is_large(pixels.shape))
            if equal and count > 1:
                warn_user(f"data: {first[0]}: all {count} images are equal; check that the files are the right ones")
            return 3 if colour else 1

        return mapped.fill_images((count, 3, *size), name, fill)


def _decoded(
    images: Iterator[Encoded], image_size: int | None, depth: BitDepth
) -> Iterator[tuple[str, np.ndarray | str]]:
    """Yields the name and the decoded image [1 or 3, H, W], or why it is broken. One thread per processor decodes."""

    def decode_block(block: list[Encoded]) -> list[np.ndarray | str]:
        return [_decode_one(image.data, image_size, depth) for image in block]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(images, CHUNK)):
            blocks = [chunk[k : k + BLOCK] for k in range(0, len(chunk), BLOCK)]
            arrays = chain.from_iterable(pool.map(decode_block, blocks))
            for image, array in zip(chunk, arrays, strict=True):
                yield image.name, array


def _decoded_only(
    arrays: Iterator[tuple[str, np.ndarray | str]], broken: list[BrokenImage]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the images that could be decoded, and appends the others to `broken`."""
    for row, (name, array) in enumerate(arrays):
        if isinstance(array, str):
            broken.append(BrokenImage(row, name, array))
        else:
            yield name, array


def _decode_one(data: bytes | Path, image_size: int | None, depth: BitDepth) -> np.ndarray | str:
    """Decodes an image to uint8 [1 or 3, H, W], a GIF to its first frame. Returns the reason if it is broken."""
    from PIL import Image

    try:
        with _open(data) as image:
            if image.mode.startswith(DEEP_MODES):
                image = Image.fromarray(_scale_to_bytes(np.asarray(image), depth()))
            elif (words := read_words(image, lambda: _open(data))) is not None:
                image = _on_ground(words_to_image(words, depth(), image.info.get("transparency")))
            else:
                image = to_eight_bits(image)
            return channels_first(image if image_size is None else fit_square(image, image_size))
    except Exception as error:  # Pillow raises nearly any exception on damaged bytes
        return _reason_of_broken_image(data, error)


def _open(data: bytes | Path) -> Any:
    """Opens an image of one of FORMATS and checks the size in its header. Does not decode the pixels."""
    from PIL import Image

    image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_formats())
    width, height = image.size
    size = len(data) if isinstance(data, bytes) else data.stat().st_size
    if width * height > MAX_PIXELS or width * height > max(FREE_PIXELS, MAX_PIXELS_PER_BYTE * size):
        image.close()
        raise ValueError(f"too large: {width} x {height} pixels in {size} bytes")
    return image


@cache
def _formats() -> tuple[str, ...]:
    """Returns those of FORMATS that this Pillow can read."""
    from PIL import Image

    Image.init()
    _silence_libtiff()
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # without it, Python prints Pillow's log to stderr
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _scale_to_bytes(array: np.ndarray, bits: int) -> np.ndarray:
    """Scales pixels of 0..2**bits to 0..255."""
    if not np.isfinite(array).all() or array.min(initial=0) < 0:
        raise ValueError("negative or non-finite pixels")
    return (array.astype(np.float64) * 2.0 ** (8 - bits)).clip(0, 255).astype(np.uint8)


def _bits_of_image(image: Encoded) -> int:
    """Returns the bits that an image needs: 0 for floats in 0..1 and for images of 8 bits, else at least 8."""
    try:
        with _open(image.data) as opened:
            if opened.mode.startswith(DEEP_MODES):
                values = np.asarray(opened)
            elif (words := read_words(opened, lambda: _open(image.data))) is not None:
                values = colour_channels(words)
            else:
                return 0
            highest = float(values.max(initial=0))
            if opened.mode == "F" and highest <= 1:
                return 0
            return max(8, int(np.ceil(highest)).bit_length())
    except Exception:  # a broken image is reported when it is decoded
        return 0


def to_eight_bits(image: Any) -> Any:
    """Converts a Pillow image with 8 bits per channel or fewer to mode L or RGB. Transparent pixels show mid grey."""
    if "A" in image.mode.upper().replace("LAB", "") or "transparency" in image.info:
        return _on_ground(image)
    return image.convert("L" if image.mode in ("L", "1") else "RGB")


def _on_ground(image: Any) -> Any:
    """Puts an image with transparent pixels on a mid grey ground. An opaque image keeps its pixels."""
    from PIL import Image

    grey = image.mode in ("L", "LA", "La", "1")
    image = image.convert("LA" if grey else "RGBA")
    mode, alpha = "L" if grey else "RGB", image.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image.convert(mode)
    ground = Image.new(mode, image.size, GROUND if grey else (GROUND,) * 3)
    ground.paste(image.convert(mode), mask=alpha)
    return ground


def _reason_of_broken_image(data: bytes | Path, error: Exception) -> str:
    from PIL import Image

    if isinstance(data, Path) and is_lfs_pointer(data):
        return "a Git LFS pointer; run `git lfs pull`"
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {_declared_size(data)} pixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "empty" if data == b"" or (isinstance(data, Path) and data.stat().st_size == 0) else "unknown format"
    return reason(error)


def _declared_size(data: bytes | Path) -> str:
    """Returns "W x H" from the header of an image that Pillow refuses to open because of its size."""
    from PIL import Image

    for name in _formats():
        stream = io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb")  # noqa: SIM115
        with stream, contextlib.suppress(Exception):
            factory, accept = Image.OPEN[name]
            if accept is None or accept(stream.read(16)) is True:
                stream.seek(0)
                width, height = factory(stream, "").size
                return f"{width} x {height}"
    return f"more than {MAX_PIXELS}"


@contextlib.contextmanager
def _pillow_warnings() -> Iterator[None]:
    """Counts the warnings of Pillow in the block and reports them as one DataWarning."""
    caught: list[str] = []
    count = 0

    def note(message: Warning | str, category: type[Warning], *details: Any, **options: Any) -> None:
        nonlocal count
        if issubclass(category, DataWarning):
            shown(message, category, *details, **options)
        elif category.__name__ != "DecompressionBombWarning":  # MAX_PIXELS decides what is too large
            count += 1
            if not caught:
                caught.append(" ".join(str(message).split())[:120])

    with warnings.catch_warnings():
        shown = warnings.showwarning
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield
    if count:
        warn_user(f"Pillow gave {count} warnings about the images, the first: {caught[0]}")


@cache
def _silence_libtiff() -> None:
    """Stops libtiff from printing to stderr. Pillow raises an exception for the same faults."""
    with contextlib.suppress(OSError, AttributeError):
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "libtiff" in line}
        for path in paths:
            library = ctypes.CDLL(path)
            for setter in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
                setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
                setter(None)


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[-2]} x {pixels.shape[-1]}"
