"""What a reader finds at a path before it decodes an image, and the names of splits and classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tadperf.errors import UserError

TEST = ("test", "validation", "valid", "val")  # the first of these that a set has is its test split
SPLITS = ("train", *TEST)


class Content(NamedTuple):
    """One split: images uint8 [N, C, H, W], labels int64 [N], and clean labels int64 [N] where the file has them."""

    images: Tensor
    labels: Tensor
    clean_labels: Tensor | None = None


class Layout(NamedTuple):
    """What a path holds: its class names, and how to read each split ("train", "test") when it is wanted."""

    class_names: tuple[str, ...]
    splits: dict[str, Callable[[], Content]]


def split_of(text: str) -> str | None:
    """The split that a file or folder name speaks of: "train-00000-of-00002" → "train"; None where it names none."""
    return next((word for word in re.split(r"[^a-z]+", text.lower()) if word in SPLITS), None)


def choose_splits(found: Mapping[str, object]) -> dict[str, str]:
    """Which of the split names found serve as "train" and "test"."""
    test = next((name for name in TEST if name in found), None)
    return ({"train": "train"} if "train" in found else {}) | ({"test": test} if test else {})


def index_labels(
    given: Mapping[str, np.ndarray], class_names: tuple[str, ...] | None, where: str
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Class names and int64 labels of every split from what a file holds: integers, or class names.

    Without `class_names`, those of integers are "0".."C-1" and those of strings are sorted. Raises UserError on labels
    of another type, below 0, or of a class that is not among the names, and where a split has none.
    """
    arrays = {split: array.squeeze(1) if array.shape[1:] == (1,) else array for split, array in given.items()}
    for split, array in arrays.items():
        if not array.size:
            raise UserError("data", where, f"the {split} split is empty")
        if array.ndim != 1 or array.dtype.kind not in "iuUO":
            kind = f"{array.dtype} {list(array.shape)}"
            raise UserError("data", where, f"labels of {kind}; must be [N] integers or class names")
    if all(array.dtype.kind in "iu" for array in arrays.values()):
        low = min(int(array.min()) for array in arrays.values())
        high = max(int(array.max()) for array in arrays.values())
        names = class_names or tuple(map(str, range(high + 1)))
        if low < 0 or high >= len(names):
            raise UserError("data", where, f"label {low if low < 0 else high}; must be in 0..{len(names) - 1}")
        return names, {split: torch.from_numpy(array.astype(np.int64)) for split, array in arrays.items()}
    names = class_names or tuple(sorted({str(value) for array in arrays.values() for value in array}))
    place = {name: c for c, name in enumerate(names)}
    return names, {split: torch.tensor([_place(place, v, where) for v in array]) for split, array in arrays.items()}


def as_numpy(labels: np.ndarray | Tensor) -> np.ndarray:
    """Labels as NumPy has them (bfloat16, which it has not, as float32: refused as labels either way)."""
    if isinstance(labels, Tensor):
        return (labels.float() if labels.is_floating_point() else labels).detach().numpy()
    return labels


def _place(place: dict[str, int], value: object, where: str) -> int:
    if str(value) not in place:
        raise UserError("data", where, f"label {str(value)!r}; is none of the {len(place)} classes")
    return place[str(value)]
