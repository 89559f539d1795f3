"""Reads data sets in the style of torchvision: Python objects with `len()`, whose items are (image, label)."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tadperf.data import mapped
from tadperf.data.decode import DEEP_MODES, to_eight_bits
from tadperf.data.layout import Content, Layout, ReadOptions, index_labels
from tadperf.data.pixels import channels_first, fit_square, from_array
from tadperf.data.text import display_name
from tadperf.errors import UserError
from tadperf.progress import Progress

CHECKED = 8  # items that are read twice in search of random transforms: a random flip escapes once in 256 sets
MOST_WRAPPERS = 10  # data sets around a data set, in search of its class names
MOST_WRAPPERS = 10  # data sets around a data set, in search of its class names
REPORT_EVERY = 256  # items between two calls of `progress`; not tuned


def items_layout(splits: Mapping[str, Any], place: Path, options: ReadOptions) -> Layout:
    """Returns the layout of data sets in the style of torchvision, by split. Reads all items.

    An item is a pair of an image (Pillow, tensor or array; uint8, or float in 0..1) and a label (integer or class
    name). The class names come from the attribute `classes`, and the file names from `samples` or `imgs`; a torch
    Subset keeps both. Raises UserError on an item of another form, on images of two sizes, if two reads of an item
    differ (a random transform), and if the images are too large for memory.
    """
    images, labels = {}, {}
    for split, items in splits.items():
        name = f"{place} ({split})"
        _require_items(items, name)
        _require_no_random_transform(items, name, options.image_size)
        images[split], labels[split] = _read_all(items, name, options.image_size, options.progress)
    names, numbers = index_labels(labels, _class_names(splits["train"]), str(place))
    contents = {split: Content(images[split], numbers[split], None, _file_names(splits[split])) for split in splits}
    return Layout(names, {split: lambda split=split: contents[split] for split in contents})


def _require_items(items: Any, name: str) -> None:
    if not hasattr(items, "__getitem__") or not hasattr(items, "__len__"):
        remedy = "must have len() and items by number, as torchvision's data sets have"
        raise UserError("data", name, f"a {type(items).__name__}; {remedy}")
    if len(items) == 0:
        raise UserError("data", name, "holds no item")


def _require_no_random_transform(items: Any, name: str, image_size: int | None) -> None:
    """Reads some items twice. tadperf augments images itself, and its results must not depend on a draw."""
    count = min(CHECKED, len(items))
    for k in range(count):
        row = k * len(items) // count
        (first, label), (second, again) = (_read_item(items, row, name, image_size) for _ in range(2))
        if label != again or not np.array_equal(first, second):
            remedy = "differs between two reads; pass the data set without random transforms, tadperf augments itself"
            raise UserError("data", f"{name} item {row}", remedy)


def _read_all(items: Any, name: str, image_size: int | None, progress: Progress) -> tuple[Tensor, np.ndarray]:
    """Returns the images uint8 [N, 1 or 3, H, W] and the labels [N]."""
    first, _ = _read_item(items, 0, name, image_size)
    shape = (len(items), 3, *first.shape[1:])
    if mapped.is_large(shape):
        size = f"{np.prod(shape, dtype=np.int64) / 2**30:.1f} GB"
        remedy = f"takes {size} in memory; save the images as files or parquet, or give a smaller image_size"
        raise UserError("data", name, remedy)
    pixels, labels, colour = np.empty(shape, np.uint8), [], False
    for row in range(len(items)):
        image, label = _read_item(items, row, name, image_size)
        if image.shape[1:] != first.shape[1:]:
            sizes = " and ".join(f"{array.shape[1]} x {array.shape[2]}" for array in (first, image))
            remedy = f"images of two sizes, {sizes}; give image_size to resize them"
            raise UserError("data", f"{name} item {row}", remedy)
        pixels[row] = image  # a grey image fills all three channels
        colour |= len(image) == 3
        labels.append(label)
        if row % REPORT_EVERY == 0 or row + 1 == len(items):
            progress("decode", row + 1, len(items))
    return torch.from_numpy(pixels if colour else pixels[:, :1].copy()), np.array(labels)


def _read_item(items: Any, row: int, name: str, image_size: int | None) -> tuple[np.ndarray, int | str]:
    """Returns the image of an item, uint8 [1 or 3, H, W], and its label."""
    place = f"{name} item {row}"
    try:
        item = items[row]
    except Exception as error:  # the code of the user
        reason = " ".join(str(error).split())[:120]
        raise UserError("data", place, f"cannot be read ({type(error).__name__}: {reason})") from error
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        kind = type(item).__name__ + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
        raise UserError("data", place, f"a {kind}; must be a pair (image, label)")
    return _pixels(item[0], place, image_size), _label(item[1], place)


def _pixels(image: Any, place: str, image_size: int | None) -> np.ndarray:
    if not hasattr(image, "convert"):
        if not isinstance(image, (np.ndarray, Tensor)) or image.ndim not in (2, 3):
            raise UserError("data", place, f"its image is a {type(image).__name__}; must be a Pillow image or a tensor")
        if isinstance(image, Tensor) and image.is_floating_point() and not (image.min() >= 0 and image.max() <= 1):
            remedy = "remove transforms.Normalize: tadperf normalises the images itself"
            raise UserError("data", place, f"its image has values outside of 0..1; {remedy}")
        pixels = from_array(image.detach().cpu()[None] if isinstance(image, Tensor) else image[None], place)[0].numpy()
        if image_size is None or pixels.shape[1:] == (image_size, image_size):
            return pixels
        from PIL import Image

        image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    if image.mode.startswith(DEEP_MODES):
        raise UserError("data", place, f"its image has mode {image.mode}; convert it to 8 bits per channel")
    image = to_eight_bits(image)
    return channels_first(image if image_size is None else fit_square(image, image_size))


def _label(label: Any, place: str) -> int | str:
    if isinstance(label, str):
        return label
    try:
        return operator.index(label)
    except (TypeError, ValueError):
        kind = type(label).__name__
        raise UserError("data", place, f"its label is a {kind}; must be an integer or a class name") from None


def _class_names(items: Any) -> tuple[str, ...] | None:
    """Returns the attribute `classes` of a data set, or of the one that it wraps."""
    for inner in _wrapped(items):
        names = getattr(inner, "classes", None)
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return None


def _file_names(items: Any) -> tuple[str, ...] | None:
    """Returns the paths of the images, as torchvision's folders and a Subset of them know them."""
    indices, inner = getattr(items, "indices", None), getattr(items, "dataset", None)
    if indices is not None and inner is not None:
        names = _file_names(inner)
        return None if names is None else tuple(names[int(i)] for i in indices)
    samples = getattr(items, "samples", getattr(items, "imgs", None))
    if not isinstance(samples, (list, tuple)) or len(samples) != len(items):
        return None
    if not all(isinstance(sample, (list, tuple)) and sample and isinstance(sample[0], str) for sample in samples):
        return None
    root, paths = Path(str(getattr(items, "root", ""))), [Path(sample[0]) for sample in samples]
    relative = [path.relative_to(root) if path.is_relative_to(root) else path for path in paths]
    return tuple(display_name(path.as_posix()) for path in relative)


def _wrapped(items: Any) -> Iterator[Any]:
    """Yields a data set, and those that it wraps: a Subset, a concatenation."""
    for _ in range(MOST_WRAPPERS):
        if items is None:
            return
        yield items
        parts = getattr(items, "datasets", None)
        items = parts[0] if isinstance(parts, (list, tuple)) and parts else getattr(items, "dataset", None)
