"""Normalised images, looked up by index."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tadperf.data.normalise import CHUNK, Normaliser


class Images(Protocol):
    """Normalised images by index: a float tensor [N, C, H, W], or a view that normalises a batch on demand."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor, /) -> Tensor: ...


class Chosen:
    """Some of the images, by their places `index` (int64 [M]) among all: no pixel is copied."""

    def __init__(self, images: Images, index: Tensor) -> None:
        self.images, self.index = images, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.images[self.index[index]]


WHOLE = 2 << 30  # bytes of float32 up to which a set is normalised once and kept


class LazyImages:
    """Normalised images of a set too large to hold as floats: a batch is normalised when it is asked for."""

    def __init__(self, normaliser: Normaliser, images: Tensor, device: torch.device | str):
        self.normaliser, self.images, self.device = normaliser.to(device), images, device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        """index int64 [B], on any device, to float32 [B, C, H, W] on the view's device."""
        return self.normaliser(self.images[index.to(self.images.device)].to(self.device))


def normalise_images(normaliser: Normaliser, images: Tensor, device: torch.device | str = "cpu") -> Tensor | LazyImages:
    """Normalised images by index: a float32 tensor on `device` up to 2 GiB, above it a view that makes batches."""
    view = LazyImages(normaliser, images, device)
    if images.numel() * 4 > WHOLE:
        return view
    whole = torch.empty(images.shape, dtype=torch.float32, device=device)
    for start in range(0, len(images), CHUNK):
        whole[start : start + CHUNK] = view.normaliser(images[start : start + CHUNK].to(device))
    return whole
