"""What a reader finds at a path before it decodes images. Also converts labels to class numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tadperf.data.dataset import BrokenImage
from tadperf.data.text import nfc
from tadperf.errors import UserError
from tadperf.progress import Progress, silent


@dataclass(frozen=True)
class ReadOptions:
    """How a set is opened. Each field but `progress` is described in the config's section `data`."""

    format: str | None = None
    image_size: int | None = None
    labels: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    label_pattern: str | None = None
    image_root: str | None = None
    test_share: float | None = None  # None: no test split is made
    skip_broken: bool = False
    progress: Progress = silent

    def values(self) -> dict[str, Any]:
        """Returns the options as JSON values: format, image_size and labels, and the others if they are set.

        `split_off_test` adds test_share if it makes a test split.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in UNNAMED}
        if self.image_root is not None:
            given["image_root"] = str(Path(self.image_root).expanduser().absolute())
        return {name: value for name, value in given.items() if name in ALWAYS_NAMED or value not in (None, False)}


UNNAMED = ("test_share", "progress")
ALWAYS_NAMED = ("format", "image_size", "labels")  # the keys that every distilled file has had from the first version


class Content(NamedTuple):
    """One split: images uint8 [N, C, H, W], labels int64 [N], and if known clean labels int64 [N] and file names.

    broken: the images that could not be decoded and are left out.
    """

    images: Tensor
    labels: Tensor
    clean_labels: Tensor | None = None
    file_names: tuple[str, ...] | None = None
    broken: tuple[BrokenImage, ...] = ()


class Layout(NamedTuple):
    """The class names at a path, and for each split ("train", "test") a function that reads it."""

    class_names: tuple[str, ...]
    splits: dict[str, Callable[[], Content]]


def index_labels(
    given: Mapping[str, np.ndarray], class_names: tuple[str, ...] | None, source: str
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Converts the labels of every split, integers or class names, to int64. Returns class names and labels.

    Without `class_names`, integers give "0".."C-1" and text gives the sorted names. Raises UserError on labels of
    another type, on a label that is not a class, and on a split without labels.
    """
    arrays = {split: array.squeeze(1) if array.shape[1:] == (1,) else array for split, array in given.items()}
    for split, array in arrays.items():
        if not array.size:
            raise UserError("data", source, f"the {split} split is empty")
        if array.ndim != 1 or array.dtype.kind not in "iuUO":
            kind = f"{array.dtype} {list(array.shape)}"
            raise UserError("data", source, f"labels of {kind}; must be [N] integers or class names")
    if all(array.dtype.kind in "iu" for array in arrays.values()):
        return _check_numbers(arrays, class_names, source)
    arrays = {split: np.array([nfc(str(value)) for value in array]) for split, array in arrays.items()}
    names = class_names or tuple(sorted({str(value) for array in arrays.values() for value in array}))
    number = {nfc(name): c for c, name in enumerate(names)}
    return names, {
        split: torch.tensor([_class_number(number, str(v), source) for v in array]) for split, array in arrays.items()
    }


def as_numpy(labels: np.ndarray | Tensor) -> np.ndarray:
    """Returns labels as a NumPy array. Floats become float32 (NumPy has no bfloat16) and are refused later."""
    if isinstance(labels, Tensor):
        return (labels.float() if labels.is_floating_point() else labels).detach().numpy()
    return labels


def _check_numbers(
    arrays: dict[str, np.ndarray], class_names: tuple[str, ...] | None, source: str
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    low = min(int(array.min()) for array in arrays.values())
    high = max(int(array.max()) for array in arrays.values())
    count = sum(map(len, arrays.values()))
    if class_names is None and high >= count:  # a class without a sample is refused anyway
        remedy = f"label {high} in a set of {count} samples; labels must be class numbers 0..C-1"
        raise UserError("data", source, remedy)
    names = class_names or tuple(map(str, range(high + 1)))
    if low < 0 or high >= len(names):
        raise UserError("data", source, f"label {low if low < 0 else high}; must be in 0..{len(names) - 1}")
    return names, {split: torch.from_numpy(array.astype(np.int64)) for split, array in arrays.items()}


def _class_number(number: dict[str, int], value: str, source: str) -> int:
    if value not in number:
        raise UserError("data", source, f"label {value!r} is not one of the {len(number)} classes")
    return number[value]
