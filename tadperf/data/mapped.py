"""Image sets larger than memory: decoded once into a memory-mapped file in the user's cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tadperf.errors import UserError

SHARE = 0.25  # of the machine's memory; sets above it are mapped, which ranks and the rest of a run then share
ROWS = 1024  # images copied at a time
VERSION = 1  # of what is in a file; part of every name


def large(shape: tuple[int, ...]) -> bool:
    """Whether uint8 images of this shape are kept in a mapped file and not in memory."""
    return int(np.prod(shape)) > SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def name_of(files: Iterable[Path], *what: object) -> str:
    """A name for what is made of these files: it changes with their paths, sizes and times of change."""
    digest = hashlib.blake2b(repr((VERSION, *what)).encode(), digest_size=16)
    for file in files:
        status = file.stat()
        digest.update(f"{file.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def folder() -> Path:
    """$XDG_CACHE_HOME/tadperf/images, by default below ~/.cache; made where it is missing."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tadperf" / "images"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


def kept(name: str) -> Tensor | None:
    """The finished file of this name, mapped: uint8 [N, C, H, W]; None where there is none."""
    try:
        # copy on write: PyTorch takes no read-only memory, and nothing is ever written
        return torch.from_numpy(np.load(folder() / f"{name}.npy", mmap_mode="c"))
    except FileNotFoundError:
        return None


def filled(shape: tuple[int, ...], name: str, fill: Callable[[np.ndarray], int]) -> Tensor:
    """uint8 [N, C, H, W] that `fill` has written: in memory, or where `large` in the mapped file of this name.

    fill: returns how many of the channels count; the rest is cut off. The file gets its name when it is whole: a killed
    process leaves a part, which the next one overwrites. Of several processes one fills it and the others wait. Raises
    UserError where the disk is too full.
    """
    if not large(shape):
        pixels = np.empty(shape, np.uint8)
        channels = fill(pixels)
        return torch.from_numpy(pixels if channels == shape[1] else pixels[:, :channels].copy())
    part, whole = folder() / f"{name}.part", folder() / f"{name}.npy"
    with open(folder() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            part.unlink(missing_ok=True)
            _refuse_full(int(np.prod(shape)))
            pixels = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
            if (channels := fill(pixels)) < shape[1]:
                wide, part = pixels, part.with_suffix(".narrow")
                pixels = np.lib.format.open_memmap(part, "w+", np.uint8, (shape[0], channels, *shape[2:]))
                for start in range(0, shape[0], ROWS):
                    pixels[start : start + ROWS] = wide[start : start + ROWS, :channels]
                whole.with_suffix(".part").unlink()
            pixels.flush()
            os.replace(part, whole)
    images = kept(name)
    assert images is not None
    return images


def _refuse_full(size: int) -> None:
    free = shutil.disk_usage(folder()).free
    if free < size:
        room = f"{size / 2**30:.1f} GB of decoded images, {free / 2**30:.1f} GB are free"
        raise UserError("data", folder(), f"has no room for {room}; set XDG_CACHE_HOME to a larger disk")
