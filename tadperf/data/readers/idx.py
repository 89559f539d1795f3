"""Reads MNIST's idx files."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from torch import Tensor

from tadperf.data import mapped
from tadperf.data.layout import Content, Layout, index_labels
from tadperf.data.pixels import from_array, stacked
from tadperf.data.readers.arrays import CHUNK
from tadperf.errors import UserError
from tadperf.progress import Progress, silent


def holds_idx(path: Path) -> bool:
    """Whether a folder holds MNIST's files."""
    return any(_idx_file(path, prefix, 3) for prefix in ("train", "t10k", "test"))


def read_idx(path: Path, image_size: int | None, progress: Progress = silent) -> Layout:
    """A folder with MNIST's train-images-idx3-ubyte.gz and the like: '-' or '.' before idx, .gz or not, t10k, test."""
    files = {"train": ("train",), "test": ("t10k", "test")}
    pairs = {split: _idx_pair(path, prefixes) for split, prefixes in files.items()}
    found = {split: pair for split, pair in pairs.items() if pair is not None}
    if not found:
        raise UserError("data", path, "has no train-images-idx3-ubyte(.gz) with train-labels-idx1-ubyte(.gz)")
    names, labels = index_labels({split: _read_idx(pair[1], 1) for split, pair in found.items()}, None, str(path))

    def read(split: str) -> Content:
        images = _read_idx_images(found[split][0], progress)
        if len(images) != len(labels[split]):
            raise UserError("data", found[split][0], f"{len(images)} images but {len(labels[split])} labels")
        return Content(images, labels[split])

    return Layout(names, {split: lambda split=split: read(split) for split in found})


def _idx_pair(path: Path, prefixes: tuple[str, ...]) -> tuple[Path, Path] | None:
    for prefix in prefixes:
        images, labels = _idx_file(path, prefix, 3), _idx_file(path, prefix, 1)
        if images and labels:
            return images, labels
        if images or labels:
            raise UserError("data", images or labels, "the file of labels or images beside it is missing; add it")
    return None


def _idx_file(path: Path, prefix: str, ndim: int) -> Path | None:
    what = {3: "images", 1: "labels"}[ndim]
    names = (f"{prefix}-{what}{dot}idx{ndim}-ubyte{packed}" for dot in "-." for packed in ("", ".gz"))
    return next((path / name for name in names if (path / name).is_file()), None)


def _read_idx_images(file: Path, progress: Progress) -> Tensor:
    """The images of an idx3 file; in parts where they are too large to be read as a whole."""
    if not mapped.large((16 * file.stat().st_size,)):  # zipped images are hardly smaller than a sixteenth
        return from_array(_read_idx(file, 3), str(file))
    with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
        _, count, height, width = (int(value) for value in np.frombuffer(stream.read(16), ">u4"))
        sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
        parts = (np.frombuffer(bytearray(stream.read(n * height * width)), np.uint8) for n in sizes)
        return stacked((part.reshape(-1, height, width) for part in parts), count, str(file), file, progress)


def _read_idx(file: Path, ndim: int) -> np.ndarray:
    """A uint8 array: two zero bytes, type 8, the number of dimensions, each size in 4 bytes, big-endian, the values."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError("data", file, f"not a whole gzip file ({error}); copy it again") from None
    start = 4 + 4 * ndim
    if data[:4] != bytes((0, 0, 8, ndim)) or len(data) < start:
        raise UserError("data", file, f"does not start as an idx{ndim} file of bytes; copy it again")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", ndim, 4))
    if len(data) != start + math.prod(shape):
        wanted = " x ".join(map(str, shape))
        raise UserError("data", file, f"{len(data) - start} bytes of {wanted} found; copy the file again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()
