"""Normalised images, looked up by index."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tadperf.data.normalise import CHUNK, Normaliser


class Images(Protocol):
    """Normalised images by index: a float tensor [N, C, H, W], or `LazyImages`, which normalises batch by batch."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor, /) -> Tensor: ...


class ImageSubset:
    """The images at `index` (int64 [M]). Copies no pixel until a batch is read."""

    def __init__(self, images: Images, index: Tensor) -> None:
        self.images, self.index = images, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.images[self.index[index]]


MAX_NORMALISED_BYTES = 2 << 30  # float32 images up to this size are normalised once and kept; not tuned


class LazyImages:
    """Images of a set that is too large to hold as floats: each batch is normalised when it is read."""

    def __init__(self, normaliser: Normaliser, images: Tensor, device: torch.device | str) -> None:
        self.normaliser, self.images, self.device = normaliser.to(device), images, device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Returns the images at `index` (int64 [B], on any device) as float32 [B, C, H, W] on `device`."""
        return self.normaliser(self.images[index.to(self.images.device)].to(self.device))


def normalise_images(normaliser: Normaliser, images: Tensor, device: torch.device | str = "cpu") -> Tensor | LazyImages:
    """Normalises images: returns a float32 tensor on `device` up to 2 GiB, above that `LazyImages`."""
    lazy = LazyImages(normaliser, images, device)
    if images.numel() * 4 > MAX_NORMALISED_BYTES:
        return lazy
    normalised = torch.empty(images.shape, dtype=torch.float32, device=device)
    for start in range(0, len(images), CHUNK):
        normalised[start : start + CHUNK] = lazy.normaliser(images[start : start + CHUNK].to(device))
    return normalised
