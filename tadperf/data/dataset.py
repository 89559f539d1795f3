"""A set of labelled images, held once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tadperf.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """One split of an image classification set.

    images: uint8 [N, C, H, W], in memory or memory-mapped, never copied whole.
    labels: int64 [N], the labels as given, each in 0..C-1 of `class_names`.
    clean_labels: int64 [N] where the truth is known. For measuring only: no method may read it.
    source: what `open_data` needs to find the set again (plain JSON values).
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str
    clean_labels: Tensor | None = None
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.images.dtype, self.images.ndim) == (torch.uint8, 4)
        assert (self.labels.dtype, self.labels.shape) == (torch.int64, self.images.shape[:1])
        if len(self) == 0:
            raise UserError("data", self.name, "holds no image")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.num_classes:
            bad = low if low < 0 else high
            remedy = f"must be in 0..{self.num_classes - 1}: {self.name} has {self.num_classes} classes"
            raise UserError("label", bad, remedy)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of the images, labels and class names: tells whether two runs saw the same data."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self), 65536):  # by chunks: a memory-mapped set is never whole in memory
            digest.update(self.images[start : start + 65536].contiguous().numpy().data)
        digest.update(self.labels.numpy().data)
        digest.update("\0".join(self.class_names).encode())
        return digest.hexdigest()

    def subset(self, index: Tensor) -> Dataset:
        """The samples at `index` (int64 [M]); clean labels follow."""
        clean = None if self.clean_labels is None else self.clean_labels[index]
        return replace(self, images=self.images[index], labels=self.labels[index], clean_labels=clean)

    def with_labels(self, labels: Tensor, clean_labels: Tensor | None) -> Dataset:
        """The same images under other given labels."""
        return replace(self, labels=labels, clean_labels=clean_labels)
