"""Normalised images, looked up by index."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tadperf.compute.transfer import upload_all
from tadperf.compute.work_progress import add_processed
from tadperf.data.normalise import CHUNK, Normaliser


class Images(Protocol):
    """Normalised images by index: a float tensor [N, C, H, W], or `LazyImages`, which normalises batch by batch."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor, /) -> Tensor: ...


def index_device(images: Images) -> torch.device:
    """Returns the device on which an index of these images should lie: a lookup then copies nothing to read it."""
    if isinstance(images, Tensor):
        return images.device
    return getattr(images, "index_device", torch.device("cpu"))


def first_image(images: Images) -> Tensor:
    """Returns the first image [1, C, H, W]."""
    return images[torch.zeros(1, dtype=torch.int64, device=index_device(images))]


class ImageSubset:
    """The images at `index` (int64 [M]). Copies no pixel until a batch is read."""

    def __init__(self, images: Images, index: Tensor) -> None:
        self.images, self.index_device = images, index_device(images)
        self.index = index.to(self.index_device)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.images[self.index[index.to(self.index_device)]]


MAX_NORMALISED_BYTES = 2 << 30  # float32 images up to this size are normalised once and kept; not tuned
# Larger sets lie on a CUDA device as uint8 pixels if they take at most this share of its free memory; not tuned.
RESIDENT_SHARE = 0.25


class LazyImages:
    """Images of a set that is too large to hold as floats: each batch is normalised when it is read."""

    def __init__(self, normaliser: Normaliser, images: Tensor, device: torch.device | str) -> None:
        self.normaliser, self.images, self.device = normaliser.to(device), images, device
        self.index_device = images.device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Returns the images at `index` (int64 [B], on any device) as float32 [B, C, H, W] on `device`."""
        (pixels,) = upload_all([self.images[index.to(self.index_device)]], torch.device(self.device))
        return self.normaliser(pixels)


def normalise_images(normaliser: Normaliser, images: Tensor, device: torch.device | str = "cpu") -> Tensor | LazyImages:
    """Normalises images: returns a float32 tensor on `device` up to 2 GiB, above that `LazyImages`.

    On CUDA the pixels of `LazyImages` lie on the device if they fit well. Otherwise each batch is copied there.
    """
    lazy = LazyImages(normaliser, images, device)
    if images.numel() * 4 > MAX_NORMALISED_BYTES:
        return LazyImages(normaliser, images.to(device), device) if _fits(images, torch.device(device)) else lazy
    normalised = torch.empty(images.shape, dtype=torch.float32, device=device)
    for start in range(0, len(images), CHUNK):
        normalised[start : start + CHUNK] = lazy.normaliser(images[start : start + CHUNK].to(device))
        add_processed(len(images[start : start + CHUNK]))
    return normalised


def device_pixels(images: Tensor, device: torch.device) -> Tensor:
    """Returns uint8 images on a CUDA device if they should be kept there, else as they are.

    Fitting and applying a normaliser then share one upload.
    """
    return images.to(device) if _fits(images, device) else images


def _fits(pixels: Tensor, device: torch.device) -> bool:
    """Returns whether uint8 pixels should be kept on a CUDA device."""
    return device.type == "cuda" and pixels.numel() <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
