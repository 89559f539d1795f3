"""From encoded or raw images to one uint8 tensor."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tadperf.data import mapped
from tadperf.errors import UserError
from tadperf.progress import Progress, silent

CHUNK = 1024  # encoded images in memory at a time
BLOCK = 32  # of them decoded by one thread in one go: on images of 32 x 32 a third faster than one by one


def decode(
    encoded: Iterator[tuple[str, bytes | Path]],
    count: int,
    image_size: int | None,
    files: Sequence[Path],
    progress: Progress = silent,
) -> Tensor:
    """Decodes `count` images (a name for messages, and bytes or a file) to uint8 [N, C, H, W].

    C is 1 where all are greyscale, else 3. `image_size` resizes each one: shorter side, centre crop. files: where the
    images come from; a set larger than memory is decoded once into a mapped file, found again by them (`mapped`).
    Raises UserError on one that cannot be decoded, and on a second size where none was asked for.
    """
    name = mapped.name_of(files, "decoded", image_size, count)
    if (kept := mapped.kept(name)) is not None:
        return kept
    arrays = _decoded(encoded, image_size)
    first, sample = next(arrays)
    size = sample.shape[-2:]

    def fill(pixels: np.ndarray) -> int:
        colour = False
        for done, (image, array) in enumerate(chain([(first, sample)], arrays)):
            if array.shape[-2:] != size:
                sizes = f"{_size(sample)} ({first}) and {_size(array)}"
                raise UserError("data", image, f"images of two sizes, {sizes}; give --image-size to resize them")
            pixels[done] = array  # greyscale fills all three channels
            colour |= len(array) == 3
            if done % CHUNK == 0 or done + 1 == count:
                progress("decode", done + 1, count)

        return 3 if colour else 1

    return mapped.filled((count, 3, *size), name, fill)


def _decoded(encoded: Iterator[tuple[str, bytes | Path]], image_size: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """Names and images [1 or 3, H, W] in order, decoded by as many threads as there are processors."""

    def decode_block(block: list[tuple[str, bytes | Path]]) -> list[np.ndarray]:
        return [_decode_one(name, data, image_size) for name, data in block]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(encoded, CHUNK)):
            blocks = [chunk[k : k + BLOCK] for k in range(0, len(chunk), BLOCK)]
            arrays = chain.from_iterable(pool.map(decode_block, blocks))
            for (name, _), array in zip(chunk, arrays, strict=True):
                yield name, array


def resize(images: Tensor, image_size: int | None, files: Sequence[Path], progress: Progress = silent) -> Tensor:
    """uint8 [N, C, H, W] to [N, C, S, S] as `decode` does it; the same tensor where the size fits already.

    files: where the images come from, as for `decode`.
    """
    if image_size is None or images.shape[-2:] == (image_size, image_size):
        return images
    from PIL import Image

    def fill(pixels: np.ndarray) -> int:
        for i, image in enumerate(images):
            array = image.permute(1, 2, 0).squeeze(-1).contiguous().numpy()
            pixels[i] = _channels_first(_square(Image.fromarray(array), image_size))
            if i % CHUNK == 0 or i + 1 == len(images):
                progress("resize", i + 1, len(images))
        return pixels.shape[1]

    shape = (*images.shape[:2], image_size, image_size)
    return mapped.filled(shape, mapped.name_of(files, "resized", *images.shape, image_size), fill)


def stacked(
    rows: Iterator[np.ndarray | Tensor], count: int, name: str, file: Path, progress: Progress = silent
) -> Tensor:
    """uint8 [N, C, H, W] from parts of an array of N images, one after the other, each as for `from_array`.

    A set larger than memory goes into a mapped file, found again by `name` and `file`.
    """
    key = mapped.name_of([file], "stacked", name)
    if (kept := mapped.kept(key)) is not None:
        return kept
    first = from_array(next(rows), name)

    def fill(pixels: np.ndarray) -> int:
        done = 0
        for part in chain([first], (from_array(row, name) for row in rows)):
            pixels[done : done + len(part)] = part.numpy()
            done += len(part)
            progress("decode", done, count)
        assert done == count
        return pixels.shape[1]

    return mapped.filled((count, *first.shape[1:]), key, fill)


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
