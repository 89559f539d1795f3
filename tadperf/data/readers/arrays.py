"""Images and labels as arrays: .npz, .safetensors, and MNIST's idx files."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from tadperf.data import mapped
from tadperf.data.layout import Content, Layout, as_numpy, index_labels
from tadperf.data.pixels import from_array, stacked
from tadperf.errors import UserError
from tadperf.progress import Progress, silent

CHUNK = 1024  # images of a larger array in memory at a time
Rows = tuple[int, Iterator[np.ndarray | Tensor]]  # how many images, and they in parts

# Keys of images and labels, as people name them.
KEYS = {
    "train": (("images", "x", "x_train", "train_images"), ("labels", "y", "y_train", "train_labels")),
    "test": (("x_test", "test_images"), ("y_test", "test_labels")),
}


def read_npz(path: Path, image_size: int | None, progress: Progress = silent) -> Layout:
    """An .npz file: images/x and labels/y, or x_train, y_train, x_test, y_test, or train_images, train_labels, ...

    Also clean_labels (of the train split) and class_names (text). Pickled objects are refused: they could run code.
    """
    try:
        file = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError("data", path, f"not a whole .npz file ({error}); write it with numpy.savez") from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise UserError("data", path, "holds one array; images and labels are wanted (numpy.savez)")

    def get(key: str) -> np.ndarray:
        try:
            return file[key]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            remedy = "store plain arrays of numbers or text" if "pickle" in str(error) else "copy the file again"
            raise UserError("data", f"{path}: {key}", f"cannot be read ({error}); {remedy}") from None

    names = tuple(map(str, get("class_names").tolist())) if "class_names" in file.files else None

    def rows(key: str) -> Rows | None:
        assert file.zip is not None
        size = file.zip.getinfo(f"{key}.npy").file_size
        return _member_rows(path, f"{key}.npy") if mapped.large((size,)) else None

    return _layout(get, file.files, names, path, rows, progress)


def read_safetensors(path: Path, image_size: int | None, progress: Progress = silent) -> Layout:
    """A .safetensors file with the keys of `read_npz`; class_names as a JSON list in the metadata.

    uint8 images [N, C, H, W] stay memory-mapped.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError("data", path, f"not a whole .safetensors file ({error}); copy it again") from None
    with file:
        keys, text = list(file.keys()), (file.metadata() or {}).get("class_names")
        tensors = {key: file.get_tensor(key) for key in keys}
    try:
        names = None if text is None else tuple(map(str, json.loads(text)))
    except (ValueError, TypeError):
        raise UserError("data", f"{path}: class_names", "must be a JSON list of names") from None

    def rows(key: str) -> Rows | None:
        tensor = tensors[key]  # mapped; as it is where it has our type and form
        if tensor.dtype == torch.uint8 and tensor.ndim == 4 and tensor.shape[1] in (1, 3):
            return None
        return (len(tensor), iter(tensor.split(CHUNK))) if mapped.large(tensor.shape) else None

    return _layout(tensors.__getitem__, keys, names, path, rows, progress)


def _member_rows(path: Path, member: str) -> Rows | None:
    """Number and parts of an array in an .npz file, read one after the other; None where it is not in C order."""

    def parts() -> Iterator[np.ndarray]:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            shape, _, dtype = _npy_header(file)
            size = math.prod(shape[1:]) * dtype.itemsize
            for start in range(0, shape[0], CHUNK):
                data = bytearray(file.read(min(CHUNK, shape[0] - start) * size))
                yield np.frombuffer(data, dtype).reshape(-1, *shape[1:])

    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        shape, fortran, dtype = _npy_header(file)
    return None if fortran or dtype.hasobject or not shape else (shape[0], parts())


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _layout(
    get: Callable[[str], Any],
    keys: Collection[str],
    names: tuple[str, ...] | None,
    path: Path,
    rows: Callable[[str], Rows | None],
    progress: Progress,
) -> Layout:
    found = {}
    for split, (image_keys, label_keys) in KEYS.items():
        image, label = (next((key for key in wanted if key in keys), None) for wanted in (image_keys, label_keys))
        if image and label:
            found[split] = image, label
    if not found:
        held = ", ".join(sorted(keys)) or "nothing"
        raise UserError("data", path, f"has no images and labels (or x_train, y_train, x_test, y_test), only {held}")
    names, labels = index_labels({split: as_numpy(get(label)) for split, (_, label) in found.items()}, names, str(path))

    def read(split: str) -> Content:
        key = found[split][0]
        parts, name = rows(key), f"{path}: {key}"  # parts only of what is too large to be read as a whole
        images = stacked(parts[1], parts[0], name, path, progress) if parts else from_array(get(key), name)
        clean = None
        if split == "train" and "clean_labels" in keys:
            clean = index_labels({split: as_numpy(get("clean_labels"))}, names, f"{path}: clean_labels")[1][split]
        for what, other in (("labels", labels[split]), ("clean_labels", clean)):
            if other is not None and len(other) != len(images):
                raise UserError("data", path, f"{len(images)} images but {len(other)} {what} in the {split} split")
        return Content(images, labels[split], clean)

    return Layout(names, {split: lambda split=split: read(split) for split in found})
