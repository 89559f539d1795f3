"""Large image sets: decoded once into a memory-mapped file in the user's cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tadperf.errors import UserError
from tadperf.files import cache_folder, write_json

SHARE = 0.25  # of the machine's memory; larger sets are mapped, and several processes share the mapped file
ROWS = 1024  # images moved at a time; not tuned
VERSION = 3  # of the decoded pixels; part of every name, so that older files are not used


def memory_bytes() -> int:
    """Returns the size of the machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_large(shape: Sequence[int]) -> bool:
    """Returns whether uint8 images of this shape are kept in a mapped file instead of in memory."""
    return math.prod(shape) > SHARE * memory_bytes()


def cache_name(files: Iterable[Path], *description: object) -> str:
    """Returns a name for images made from these files. It changes with their paths, sizes and modification times."""
    digest = hashlib.blake2b(repr((VERSION, *description)).encode(), digest_size=16)
    for file in files:
        status = file.stat()
        digest.update(os.fsencode(f"{file.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    return digest.hexdigest()


def cached_images(name: str) -> Tensor | None:
    """Memory-maps the complete file of this name: uint8 [N, C, H, W]. Returns None if there is none."""
    try:
        # mode "c" copies on write: PyTorch needs writable memory, and the file must not change
        return torch.from_numpy(np.load(_folder(create=False) / f"{name}.npy", mmap_mode="c"))
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return None


def fill_images(shape: tuple[int, int, int, int], name: str, fill: Callable[[np.ndarray], int]) -> Tensor:
    """Allocates uint8 [N, C, H, W], in memory or (if large) in a mapped file of this name, and fills it.

    fill: writes the images and returns how many channels are used; the other channels are cut off.
    The file gets its name when it is complete. A killed process leaves a partial file, which the next one overwrites.
    If several processes ask for the same file, one fills it and the others wait. Raises UserError if the disk is full.
    """
    if not is_large(shape):
        pixels = np.empty(shape, np.uint8)
        channels = fill(pixels)
        return torch.from_numpy(pixels if channels == shape[1] else pixels[:, :channels].copy())
    folder = _folder(create=True)
    partial, complete = folder / f"{name}.part", folder / f"{name}.npy"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            partial.unlink(missing_ok=True)
            _require_space(folder, math.prod(shape))
            try:
                pixels = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
                if (channels := fill(pixels)) < shape[1]:
                    _cut_channels(partial, pixels, channels)
                pixels.flush()
            except UserError:  # an image is broken: the file would never be completed
                partial.unlink()
                raise
            os.replace(partial, complete)
    images = cached_images(name)
    assert images is not None
    return images


def remember(name: str, values: object) -> None:
    """Stores JSON values under this name in the cache folder."""
    write_json(_folder(create=True) / f"{name}.json", values)


def recall(name: str) -> Any | None:
    """Returns the values that `remember` stored under this name. Returns None if there are none."""
    try:
        return json.loads((_folder(create=False) / f"{name}.json").read_bytes())
    except (OSError, ValueError):
        return None


def _cut_channels(file: Path, pixels: np.memmap, channels: int) -> None:
    """Removes all channels but the first ones from a mapped .npy file, in place, so that it needs no more disk space.

    The pixels of an image move towards the start of the file, never beyond the images that are still to be moved.
    """
    count, _, height, width = pixels.shape
    flat, size = pixels.reshape(-1), channels * height * width
    for start in range(0, count, ROWS):
        rows = pixels[start : start + ROWS, :channels].copy()
        flat[start * size : start * size + rows.size] = rows.reshape(-1)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, channels, height, width)}
    with open(file, "r+b") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        assert stream.tell() == pixels.offset, "a header of another length"
        stream.truncate(pixels.offset + count * size)


def _folder(create: bool) -> Path:
    return cache_folder("images", create)


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        sizes = f"{size / 2**30:.1f} GB needed for decoded images, {free / 2**30:.1f} GB free"
        raise UserError("cache folder", folder, f"{sizes}; set XDG_CACHE_HOME to a larger disk")
