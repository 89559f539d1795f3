"""A set of labelled images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tadperf.errors import UserError


class BrokenImage(NamedTuple):
    """An image that cannot be decoded: its row in the split, its name, and the reason."""

    row: int
    name: str
    reason: str


@dataclass(frozen=True, repr=False)
class Dataset:
    """One split of an image classification set.

    images: uint8 [N, channels, H, W], in memory or memory-mapped, never copied as a whole.
    labels: int64 [N], the given labels, each an index into `class_names`.
    clean_labels: int64 [N] if the true labels are known. Only measurements and oracle mode may read them.
    file_names: for sets of files, the path of each image relative to the folder that was opened.
    source: what `open_data` needs to open the set again, as JSON values.
    broken: the images that could not be decoded and are left out; their rows count all images of the split.
    rows: int64 [N], the row of each sample in the split as it was opened, if samples are left out; else None.
    opened: the number of samples in that split.
    Raises UserError if a tensor has another type or shape, if there is no image, or if a label is out of range.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str
    clean_labels: Tensor | None = None
    source: dict[str, Any] = field(default_factory=dict)
    file_names: tuple[str, ...] | None = None
    broken: tuple[BrokenImage, ...] = ()
    rows: Tensor | None = None
    opened: int = 0

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.images.shape[1:]))
        return f"Dataset({self.name}: {len(self.images)} images of {size}, {self.num_classes} classes)"

    def __post_init__(self) -> None:
        if (self.images.dtype, self.images.ndim) != (torch.uint8, 4):
            raise UserError("images", describe_tensor(self.images), "must be uint8 [N, channels, H, W]")
        for field_name, labels in (("labels", self.labels), ("clean_labels", self.clean_labels)):
            if labels is not None and (labels.dtype, labels.shape) != (torch.int64, self.images.shape[:1]):
                raise UserError(field_name, describe_tensor(labels), f"must be int64 [{len(self.images)}]")
        if self.file_names is not None and len(self.file_names) != len(self.images):
            raise UserError("file_names", len(self.file_names), f"must be {len(self.images)} names, one per image")
        if len(self) == 0:
            raise UserError("data", self.name, "holds no image")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.num_classes:
            bad = low if low < 0 else high
            remedy = f"must be in 0..{self.num_classes - 1}: {self.name} has {self.num_classes} classes"
            raise UserError("label", bad, remedy)
        if not self.opened:
            object.__setattr__(self, "opened", len(self) + len(self.broken))
        if self.broken and self.rows is None:
            mask = torch.ones(self.opened, dtype=torch.bool)
            mask[[image.row for image in self.broken]] = False
            object.__setattr__(self, "rows", mask.nonzero()[:, 0])

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of the images, labels and class names, equal for equal data."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self), 65536):  # in chunks, so that a memory-mapped set is never read as a whole
            digest.update(self.images[start : start + 65536].contiguous().numpy().data)
        digest.update(self.labels.numpy().data)
        digest.update("\0".join(self.class_names).encode(errors="surrogateescape"))
        return digest.hexdigest()

    def subset(self, index: Tensor) -> Dataset:
        """Returns the samples at `index` (int64 [M]), with their clean labels and file names."""
        clean = None if self.clean_labels is None else self.clean_labels[index]
        names = None if self.file_names is None else tuple(self.file_names[i] for i in index.tolist())
        images, labels = self.images[index], self.labels[index]
        rows = index if self.rows is None else self.rows[index]
        return replace(self, images=images, labels=labels, clean_labels=clean, file_names=names, rows=rows)

    def with_labels(self, labels: Tensor, clean_labels: Tensor | None) -> Dataset:
        """Returns the same images with other given labels."""
        return replace(self, labels=labels, clean_labels=clean_labels)


def describe_tensor(tensor: Tensor) -> str:
    """Returns type and shape for a message: "float32 [12, 3]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
