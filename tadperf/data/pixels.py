"""From encoded or raw images to one uint8 tensor."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tadperf.errors import UserError

CHUNK = 1024  # encoded images in memory at a time
BLOCK = 32  # of them decoded by one thread in one go: on images of 32 x 32 a third faster than one by one


def decode(encoded: Iterator[tuple[str, bytes | Path]], count: int, image_size: int | None) -> Tensor:
    """Decodes `count` images (a name for messages, and bytes or a file) to uint8 [N, C, H, W].

    C is 1 where all are greyscale, else 3. `image_size` resizes each one: shorter side, centre crop. Raises UserError
    on one that cannot be decoded, and on a second size where none was asked for.
    """

    def decode_block(block: list[tuple[str, bytes | Path]]) -> list[np.ndarray]:
        return [_decode_one(name, data, image_size) for name, data in block]

    pixels, colour, first = np.empty(0, np.uint8), False, ""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = 0
        while chunk := list(islice(encoded, CHUNK)):
            blocks = [chunk[k : k + BLOCK] for k in range(0, len(chunk), BLOCK)]
            arrays = chain.from_iterable(pool.map(decode_block, blocks))
            for (name, _), array in zip(chunk, arrays, strict=True):
                if not done:
                    pixels, first = np.empty((count, 3, *array.shape[-2:]), np.uint8), name
                if array.shape[-2:] != pixels.shape[-2:]:
                    sizes = f"{_size(pixels)} ({first}) and {_size(array)}"
                    raise UserError("data", name, f"images of two sizes, {sizes}; give --image-size to resize them")
                pixels[done] = array  # greyscale fills all three channels
                colour |= len(array) == 3
                done += 1
    assert done == count
    return torch.from_numpy(pixels if colour else pixels[:, :1].copy())


def resize(images: Tensor, image_size: int | None) -> Tensor:
    """uint8 [N, C, H, W] to [N, C, S, S] as `decode` does it; the same tensor where the size fits already."""
    if image_size is None or images.shape[-2:] == (image_size, image_size):
        return images
    from PIL import Image

    out = torch.empty(*images.shape[:2], image_size, image_size, dtype=torch.uint8)
    for i, image in enumerate(images):
        array = image.permute(1, 2, 0).squeeze(-1).contiguous().numpy()
        out[i] = torch.from_numpy(_channels_first(_square(Image.fromarray(array), image_size)).copy())
    return out


def from_array(array: np.ndarray | Tensor, name: str) -> Tensor:
    """Images as arrays hold them to uint8 [N, C, H, W]: [N, H, W], [N, H, W, C], [N, C, H, W], uint8 or float in 0..1.

    C must be 1 or 3. uint8 [N, C, H, W] stays where it is (a memory map stays one). Raises UserError on another shape,
    type or range.
    """
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "biuf":
            raise UserError("data", name, f"images of {array.dtype}; must be uint8, or float in 0..1")
        array = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))
    images: Tensor = array
    shape = list(images.shape)
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError("data", name, f"images of shape {shape}; must be [N, H, W], [N, H, W, C] or [N, C, H, W]")
    if images.is_floating_point():
        low, high = images.aminmax() if images.numel() else (torch.zeros(()), torch.zeros(()))
        if not (low >= 0 and high <= 1):  # so that NaN is refused too
            raise UserError("data", name, f"float images in {low:g}..{high:g}; scale them to 0..1, or store uint8")
        images = (images * 255).round().to(torch.uint8)
    if images.dtype != torch.uint8:
        raise UserError("data", name, f"images of {str(images.dtype)[6:]}; must be uint8, or float in 0..1")
    return images.contiguous()


def _decode_one(name: str, encoded: bytes | Path, image_size: int | None) -> np.ndarray:
    """One image as uint8 [1 or 3, H, W]; of a GIF the first frame."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            if image.mode in ("L", "LA", "1"):
                image = image.convert("L")
            elif image.mode.startswith("I"):  # 16 bits of grey: keep the upper 8
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            else:
                image = image.convert("RGB")
            return _channels_first(image if image_size is None else _square(image, image_size))
    except Exception as error:  # pillow raises nearly anything on damaged bytes
        raise UserError("data", name, f"no image ({_first_line(error)}); repair or remove it") from None


def _square(image: Any, side: int) -> Any:
    """Shorter side to `side`, centre crop; bicubic with antialiasing, cut and resized in one step."""
    from PIL import Image, ImageOps

    return image if image.size == (side, side) else ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


def _channels_first(image: Any) -> np.ndarray:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[-2]} x {pixels.shape[-1]}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
