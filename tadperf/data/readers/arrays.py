"""Reads images and labels that are stored as arrays: .npz and .safetensors."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tadperf.data import mapped
from tadperf.data.layout import Content, Layout, ReadOptions, as_numpy, index_labels
from tadperf.data.npy import MAGIC, read_npy, read_npy_header
from tadperf.data.parsing import parser_errors
from tadperf.data.pixels import from_array, stack_parts
from tadperf.errors import UserError
from tadperf.progress import Progress

CHUNK = 1024  # images of a larger array in memory at a time; not tuned
Parts = tuple[int, Iterator[np.ndarray | Tensor]]  # the number of images, and the images in parts

# Common names of images and labels.
KEYS = {
    "train": (("images", "x", "x_train", "train_images"), ("labels", "y", "y_train", "train_labels")),
    "test": (("x_test", "test_images"), ("y_test", "test_labels")),
}


def read_npz(path: Path, options: ReadOptions) -> Layout:
    """Reads an .npz file: images or x with labels or y; x_train, y_train, x_test, y_test; train_images, ...

    Also reads clean_labels (of the train split) and class_names (text). Raises UserError on a damaged file and on
    pickled objects, which could run code.
    """
    with parser_errors(".npz file", path, "write it with numpy.savez"):
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                raise UserError("data", path, "holds one array; store images and labels with numpy.savez")
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}

    def get(key: str) -> np.ndarray:
        member, name = members[key], f"{path}: {key}"
        with parser_errors("array", name), zipfile.ZipFile(path) as archive, archive.open(member) as file:
            return read_npy(file, name, member.compress_size, member.compress_type != zipfile.ZIP_STORED)

    def parts(key: str) -> Parts | None:
        return _member_parts(path, key, members[key]) if mapped.is_large((members[key].file_size,)) else None

    names = _text_names(get("class_names"), path) if "class_names" in members else None
    return _layout(get, members, names, path, parts, options.progress)


def read_safetensors(path: Path, options: ReadOptions) -> Layout:
    """Reads a .safetensors file with the keys of `read_npz`. class_names is a JSON list in the metadata.

    uint8 images [N, C, H, W] stay memory-mapped.
    """
    from safetensors import safe_open

    with parser_errors(".safetensors file", path), safe_open(path, "pt") as file:
        keys, text = list(file.keys()), (file.metadata() or {}).get("class_names")
    names = None
    if text is not None:
        with parser_errors("JSON list of names", f"{path}: class_names", "store class_names as a JSON list"):
            values = json.loads(text)
            if not isinstance(values, list):
                raise ValueError(f"a JSON {type(values).__name__}")
            names = tuple(map(str, values))

    def get(key: str) -> Tensor:
        with parser_errors("tensor", f"{path}: {key}"), safe_open(path, "pt") as file:
            return file.get_tensor(key)

    def parts(key: str) -> Parts | None:
        tensor = get(key)  # memory-mapped; used as it is if it has the right type and shape
        if tensor.dtype == torch.uint8 and tensor.ndim == 4 and tensor.shape[1] in (1, 3):
            return None
        return (len(tensor), iter(tensor.split(CHUNK))) if mapped.is_large(tensor.shape) else None

    return _layout(get, keys, names, path, parts, options.progress)


def _text_names(names: np.ndarray, path: Path) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind not in "US":
        kind = f"{names.dtype} {list(names.shape)}"
        raise UserError("data", f"{path}: class_names", f"an array of {kind}; must be [C] text")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names.tolist())


def _member_parts(path: Path, key: str, member: zipfile.ZipInfo) -> Parts | None:
    """Returns the images of an array in an .npz file in parts. Returns None for an array in Fortran order."""
    name, compressed = f"{path}: {key}", member.compress_type != zipfile.ZIP_STORED

    def parts() -> Iterator[np.ndarray]:
        with parser_errors("array", name), zipfile.ZipFile(path) as archive, archive.open(member) as file:
            header = read_npy_header(file, name, member.compress_size, compressed, in_parts=True)
            size = math.prod(header.shape[1:]) * header.dtype.itemsize
            for start in range(0, header.shape[0], CHUNK):
                data = bytearray(file.read(min(CHUNK, header.shape[0] - start) * size))
                yield np.frombuffer(data, header.dtype).reshape(-1, *header.shape[1:])

    with parser_errors("array", name), zipfile.ZipFile(path) as archive, archive.open(member) as file:
        header = read_npy_header(file, name, member.compress_size, compressed, in_parts=True)
    return None if header.order == "F" or not header.shape else (header.shape[0], parts())


def _layout(
    get: Callable[[str], Any],
    keys: Collection[str],
    names: tuple[str, ...] | None,
    path: Path,
    parts: Callable[[str], Parts | None],
    progress: Progress,
) -> Layout:
    """Finds the arrays of each split among the keys. `parts` returns an array in parts if it is large, else None."""
    pairs = {}
    for split, (image_keys, label_keys) in KEYS.items():
        image, label = (next((key for key in known if key in keys), None) for known in (image_keys, label_keys))
        if image and label:
            pairs[split] = image, label
    if not pairs:
        names_found = ", ".join(sorted(keys))[:200] or "nothing"
        remedy = f"has no images and labels (or x_train, y_train, x_test, y_test), only {names_found}"
        raise UserError("data", path, remedy)
    names, labels = index_labels({split: as_numpy(get(label)) for split, (_, label) in pairs.items()}, names, str(path))

    def read(split: str) -> Content:
        key = pairs[split][0]
        large, name = parts(key), f"{path}: {key}"
        images = stack_parts(large[1], large[0], name, path, progress) if large else from_array(get(key), name)
        clean = None
        if split == "train" and "clean_labels" in keys:
            clean = index_labels({split: as_numpy(get("clean_labels"))}, names, f"{path}: clean_labels")[1][split]
        for kind, values in (("labels", labels[split]), ("clean_labels", clean)):
            if values is not None and len(values) != len(images):
                raise UserError("data", path, f"{len(images)} images but {len(values)} {kind} in the {split} split")
        return Content(images, labels[split], clean)

    return Layout(names, {split: lambda split=split: read(split) for split in pairs})
