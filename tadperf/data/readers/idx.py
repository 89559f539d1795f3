"""Reads MNIST's idx files."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, cast

import numpy as np
from torch import Tensor

from tadperf.data import mapped
from tadperf.data.layout import Content, Layout, ReadOptions, index_labels
from tadperf.data.parsing import parser_errors, require_size
from tadperf.data.pixels import from_array, stack_parts
from tadperf.data.readers.arrays import CHUNK
from tadperf.errors import UserError
from tadperf.progress import Progress

PREFIXES = {"train": ("train",), "test": ("t10k", "test")}


def holds_idx(path: Path) -> bool:
    """Returns whether a folder holds MNIST's files."""
    return any(_idx_file(path, prefix, 3) for prefixes in PREFIXES.values() for prefix in prefixes)


def read_idx(path: Path, options: ReadOptions) -> Layout:
    """Reads a folder with train-images-idx3-ubyte.gz and so on: '-' or '.' before idx, .gz or not, t10k or test.

    Raises UserError on a missing or damaged file.
    """
    pairs = {split: _idx_pair(path, prefixes) for split, prefixes in PREFIXES.items()}
    files = {split: pair for split, pair in pairs.items() if pair is not None}
    if not files:
        raise UserError("data", path, "has no train-images-idx3-ubyte(.gz) with train-labels-idx1-ubyte(.gz)")
    names, labels = index_labels({split: _read_array(pair[1], 1) for split, pair in files.items()}, None, str(path))

    def read(split: str) -> Content:
        images = _read_images(files[split][0], options.progress)
        if len(images) != len(labels[split]):
            raise UserError("data", files[split][0], f"{len(images)} images but {len(labels[split])} labels")
        return Content(images, labels[split])

    return Layout(names, {split: lambda split=split: read(split) for split in files})


def _idx_pair(path: Path, prefixes: tuple[str, ...]) -> tuple[Path, Path] | None:
    for prefix in prefixes:
        images, labels = _idx_file(path, prefix, 3), _idx_file(path, prefix, 1)
        if images and labels:
            return images, labels
        if images or labels:
            raise UserError("data", images or labels, "the matching file of images or labels is missing; add it")
    return None


def _idx_file(path: Path, prefix: str, ndim: int) -> Path | None:
    content = {3: "images", 1: "labels"}[ndim]
    names = (f"{prefix}-{content}{dot}idx{ndim}-ubyte{packed}" for dot in "-." for packed in ("", ".gz"))
    return next((path / name for name in names if (path / name).is_file()), None)


def _read_images(file: Path, progress: Progress) -> Tensor:
    """Reads the images of an idx3 file, in parts if they are too large to be read at once."""
    if not mapped.is_large((16 * file.stat().st_size,)):  # gzip rarely makes images smaller than a sixteenth
        return from_array(_read_array(file, 3), str(file))
    with _parsing(file), _open(file) as stream:
        count, height, width = _read_header(stream, file, 3)
        return stack_parts(_parts(stream, file, (count, height, width)), count, str(file), file, progress)


def _parts(stream: IO[bytes], file: Path, shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Yields the images in parts of CHUNK, and checks that the file ends after the last one."""
    count, height, width = shape
    for start in range(0, count, CHUNK):
        n = min(CHUNK, count - start)
        data = bytearray(stream.read(n * height * width))
        if len(data) < n * height * width:
            raise _wrong_size(file, start * height * width + len(data), shape)
        if start + n == count and stream.read(1):
            raise _wrong_size(file, math.prod(shape) + 1, shape)
        yield np.frombuffer(data, np.uint8).reshape(n, height, width)


def _read_array(file: Path, ndim: int) -> np.ndarray:
    """Reads a uint8 array and checks that the file ends after it."""
    with _parsing(file), _open(file) as stream:
        shape = _read_header(stream, file, ndim)
        data = bytearray(stream.read(math.prod(shape) + 1))
    if len(data) != math.prod(shape):
        raise _wrong_size(file, len(data), shape)
    return np.frombuffer(data, np.uint8).reshape(shape)


def _wrong_size(file: Path, size: int, shape: tuple[int, ...]) -> UserError:
    """size: the bytes that were read after the header."""
    amount = "too many" if size > math.prod(shape) else f"{size}"
    sides = " x ".join(map(str, shape))
    return UserError("data", file, f"{amount} bytes; the header declares {sides}; copy the file again")


def _read_header(stream: IO[bytes], file: Path, ndim: int) -> tuple[int, ...]:
    """Reads two zero bytes, type 8, the number of dimensions, and each size in 4 bytes, big-endian."""
    start = 4 + 4 * ndim
    header = stream.read(start)
    if header[:4] != bytes((0, 0, 8, ndim)) or len(header) < start:
        raise UserError("data", file, f"does not start as an idx{ndim} file of bytes; copy it again")
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4", ndim, 4))
    require_size(file, shape, 1, file.stat().st_size, compressed=file.suffix == ".gz", in_parts=ndim == 3)
    return shape


def _open(file: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(file)) if file.suffix == ".gz" else open(file, "rb")


def _parsing(file: Path) -> AbstractContextManager[None]:
    return parser_errors("gzip file" if file.suffix == ".gz" else "idx file", file)
