"""Converts images in arrays to one uint8 tensor, and resizes images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tadperf.data import mapped
from tadperf.errors import UserError
from tadperf.progress import Progress, silent

CHANNELS = (1, 3)
REPORT_EVERY = 1024  # images between two calls of `progress`; not tuned


def from_array(array: np.ndarray | Tensor, name: str) -> Tensor:
    """Converts images to uint8 [N, C, H, W] with C = 1 or 3.

    array: [N, H, W], [N, H, W, C] or [N, C, H, W], of uint8 or of floats in 0..1. uint8 [N, C, H, W] is not copied, so
    a memory-mapped tensor stays mapped. Raises UserError on another shape, type or range.
    """
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "biuf":
            raise UserError("data", name, f"images of {array.dtype}; must be uint8, or float in 0..1")
        array = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))
    images = _channels_second(array, name)
    if images.is_floating_point():
        images = _bytes_of_floats(images, name)
    if images.dtype != torch.uint8:
        raise UserError("data", name, f"images of {str(images.dtype)[6:]}; must be uint8, or float in 0..1")
    return images.contiguous()


def stack_parts(
    parts: Iterator[np.ndarray | Tensor], count: int, name: str, file: Path, progress: Progress = silent
) -> Tensor:
    """Stacks the parts of an array of N images to uint8 [N, C, H, W]. `from_array` must accept each part.

    A large set goes into a mapped file whose name depends on `name` and `file`.
    """
    key = mapped.cache_name([file], "stacked", name)
    if (cached := mapped.cached_images(key)) is not None:
        return cached
    first = from_array(next(parts), name)

    def fill(pixels: np.ndarray) -> int:
        done = 0
        for part in chain([first], (from_array(part, name) for part in parts)):
            pixels[done : done + len(part)] = part.numpy()
            done += len(part)
            progress("decode", done, count)
        assert done == count
        return pixels.shape[1]

    channels, height, width = first.shape[1:]
    return mapped.fill_images((count, channels, height, width), key, fill)


def resize(images: Tensor, image_size: int | None, files: Sequence[Path], progress: Progress = silent) -> Tensor:
    """Resizes uint8 [N, C, H, W] to [N, C, S, S], as `decode` does. Returns the same tensor if the size fits.

    files: the files that the images come from, as for `decode`.
    """
    if image_size is None or images.shape[-2:] == (image_size, image_size):
        return images
    from PIL import Image

    def fill(pixels: np.ndarray) -> int:
        for i, image in enumerate(images):
            array = image.permute(1, 2, 0).squeeze(-1).contiguous().numpy()
            pixels[i] = channels_first(fit_square(Image.fromarray(array), image_size))
            if i % REPORT_EVERY == 0 or i + 1 == len(images):
                progress("resize", i + 1, len(images))
        return pixels.shape[1]

    shape = (len(images), images.shape[1], image_size, image_size)
    return mapped.fill_images(shape, mapped.cache_name(files, "resized", *images.shape, image_size), fill)


def fit_square(image: Any, side: int) -> Any:
    """Resizes a Pillow image, shorter side to `side`, and crops its centre. Bicubic with antialiasing, in one step."""
    from PIL import Image, ImageOps

    return image if image.size == (side, side) else ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


def channels_first(image: Any) -> np.ndarray:
    """Returns a Pillow image as uint8 [1 or 3, H, W]."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _channels_second(images: Tensor, name: str) -> Tensor:
    """Returns images as [N, C, H, W]. Raises UserError if the shape fits no layout, or fits two."""
    shape = list(images.shape)
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim != 4:
        raise UserError("data", name, f"images of shape {shape}; must be [N, H, W], [N, H, W, C] or [N, C, H, W]")
    elif shape[1] in CHANNELS and shape[3] in CHANNELS:
        remedy = "can be [N, C, H, W] or [N, H, W, C]; pad the images to sides other than 1 and 3"
        raise UserError("data", name, f"images of shape {shape} {remedy}")
    elif shape[3] in CHANNELS:
        images = images.permute(0, 3, 1, 2)
    elif shape[1] not in CHANNELS:
        channels = min(shape[1], shape[3])
        kind = " (colour and alpha, or CMYK)" if channels == 4 else ""
        remedy = "store 3 colour channels or 1 grey channel, for example images[..., :3]"
        raise UserError("data", name, f"images of shape {shape}: {channels} channels{kind}; {remedy}")
    if images.numel() == 0 and len(images) > 0:
        raise UserError("data", name, f"images of shape {shape} have no pixels")
    return images


def _bytes_of_floats(images: Tensor, name: str) -> Tensor:
    low, high = images.aminmax() if images.numel() else (torch.zeros(()), torch.zeros(()))
    if not (low >= 0 and high <= 1):  # NaN fails both comparisons
        finite = images.isfinite().flatten(1).all(1)
        if not finite.all():
            first = int((~finite).nonzero()[0])
            remedy = f"image {first} has a NaN or infinite pixel; replace it or remove the image"
            raise UserError("data", name, remedy)
        raise UserError("data", name, f"float images in {low:g}..{high:g}; scale them to 0..1, or store uint8")
    return (images * 255).round().to(torch.uint8)
