"""Decodes the images of one split. Leaves out broken ones if the user wants that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tadperf.compute import ranks
from tadperf.data import mapped
from tadperf.data.dataset import BrokenImage
from tadperf.data.decode import BitDepth, BrokenImagesError, Encoded, decode
from tadperf.data.layout import Content, ReadOptions
from tadperf.errors import UserError


def decode_split(
    images: Callable[[], Iterator[Encoded]],
    labels: Tensor,
    options: ReadOptions,
    files: Sequence[Path],
    depth: BitDepth,
    file_names: tuple[str, ...] | None = None,
    clean_labels: Tensor | None = None,
    key: str = "",
) -> Content:
    """Decodes the N images that `images` yields, as `decode` does. labels, clean_labels: int64 [N].

    With options.skip_broken, leaves out the images that cannot be decoded, with their labels and names. All ranks leave
    out those that rank 0 cannot decode. Raises UserError as `decode` does, and if no image is left.
    """

    def decode_rows(images: Iterator[Encoded], count: int) -> Tensor:
        return decode(images, count, options.image_size, files, depth, options.progress, key)

    if not options.skip_broken:
        return Content(decode_rows(images(), len(labels)), labels, clean_labels, file_names)
    decoded: list[Tensor] = []
    name = mapped.cache_name(files, "broken", options.image_size, len(labels), key)
    broken = ranks.once(lambda: _find_broken(lambda: decode_rows(images(), len(labels)), name, decoded))
    if file_names is not None:
        broken = tuple(image._replace(name=file_names[image.row]) for image in broken)
    if len(broken) == len(labels):
        raise BrokenImagesError(broken)
    rows = {image.row for image in broken}
    kept = torch.tensor([row for row in range(len(labels)) if row not in rows])
    good = (image for row, image in enumerate(images()) if row not in rows)
    pixels = decoded[0] if decoded else decode_rows(good, len(kept))
    names = None if file_names is None else tuple(file_names[row] for row in kept.tolist())
    clean = None if clean_labels is None else clean_labels[kept]
    return Content(pixels, labels[kept], clean, names, broken)


def _find_broken(decode_all: Callable[[], Tensor], name: str, decoded: list[Tensor]) -> tuple[BrokenImage, ...]:
    """Returns the images that cannot be decoded. If there are none, appends the pixels to `decoded`.

    The list for a large set is kept in the cache folder under `name`, because decoding takes long.
    """
    if (known := mapped.recall(name)) is not None:
        return tuple(BrokenImage(*image) for image in known)
    try:
        decoded.append(decode_all())
    except BrokenImagesError as error:
        if error.large:
            mapped.remember(name, error.broken)
        return error.broken
    except UserError:  # the caller decodes again and raises it; other ranks, which wait for this list, do the same
        pass
    return ()
