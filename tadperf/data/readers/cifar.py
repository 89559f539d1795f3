"""CIFAR-10 and CIFAR-100 in the form their authors publish: Python pickles, in a folder or a tar archive.

A pickle can run any code. These hold NumPy arrays and plain containers, so nothing else is let in.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tadperf.data.layout import Content, Layout, index_labels
from tadperf.errors import UserError
from tadperf.progress import Progress, silent

CIFAR10 = {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)}
CIFAR100 = {"train": ("train",), "test": ("test",)}


def holds_cifar(path: Path) -> bool:
    """Whether a folder holds the pickles of CIFAR-10 or CIFAR-100."""
    return any((path / name).is_file() for name in ("data_batch_1", "test_batch", "batches.meta", "meta"))


def read_cifar(path: Path, image_size: int | None, progress: Progress = silent) -> Layout:
    """A folder, or a .tar.gz, with data_batch_1..5, test_batch, batches.meta, or with train, test, meta (fine labels).

    Without the meta file classes are named "0".."C-1". Raises UserError on a missing or damaged file, and on a pickle
    that holds anything but arrays and plain containers; code in it does not run.
    """
    files = _in_tar(path) if path.is_file() else {f.name: f.read_bytes for f in sorted(path.iterdir()) if f.is_file()}
    batches, meta, key, classes = CIFAR10, "batches.meta", "label_names", 10
    if CIFAR10["train"][0] not in files and CIFAR10["test"][0] not in files:
        batches, meta, key, classes = CIFAR100, "meta", "fine_label_names", 100
    names = tuple(map(str, range(classes)))
    if meta in files:
        names = tuple(map(_text, _field(_load(files[meta](), path / meta), (key,), path / meta)))
    found = {split: wanted for split, wanted in batches.items() if any(name in files for name in wanted)}
    if not found:
        raise UserError("data", path, "holds neither data_batch_1..5 and test_batch nor train and test of CIFAR")

    def read(split: str) -> Content:
        images, labels = [], []
        for name in found[split]:
            if name not in files:
                raise UserError("data", path / name, "is missing beside the other batches; add it")
            batch = _load(files[name](), path / name)
            images.append(_pixels(_field(batch, ("data",), path / name), path / name))
            labels.append(np.asarray(_field(batch, ("fine_labels", "labels"), path / name)))
            if len(images[-1]) != len(labels[-1]):
                raise UserError("data", path / name, f"{len(images[-1])} images but {len(labels[-1])} labels")
        _, indexed = index_labels({split: np.concatenate(labels)}, names, str(path))
        return Content(torch.from_numpy(np.concatenate(images)), indexed[split])

    return Layout(names, {split: lambda split=split: read(split) for split in found})


def restricted_load(data: bytes) -> Any:
    """Unpickles an array, plain containers, or a dict of such; raises pickle.UnpicklingError on any other name."""
    content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    if isinstance(content, dict):
        return {key: value.array if isinstance(value, _Array) else value for key, value in content.items()}
    return content.array if isinstance(content, _Array) else content


class _Dtype:
    """Stands for a pickled numpy.dtype: numbers only. NumPy's own would take its state, flags and all, unchecked."""

    def __init__(self, spec: str, *flags: object):
        self.dtype = np.dtype(str(spec))
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"it holds an array of {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for a pickled numpy.ndarray, and makes the array from its shape, type and bytes."""

    def __init__(self, *empty: object):
        self.array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data  # a str of Python 2 is its bytes
        self.array = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C").copy()


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}")
    return text.encode("latin1")


# How NumPy pickles an array; and bytes, which protocol 2 of Python 3 spells _codecs.encode(text, "latin1").
_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct, never called
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        place = module.replace("numpy._core", "numpy.core"), name  # as NumPy 2 and 1 spell it
        if place not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _KNOWN[place]


def _load(data: bytes, file: Path) -> dict[str, Any]:
    """One pickled dict, its keys as text."""
    try:
        content = restricted_load(data)
    except pickle.UnpicklingError as error:
        raise UserError("data", file, f"refused as unsafe ({error}); take the original file") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError("data", file, f"damaged pickle ({type(error).__name__}: {error}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError("data", file, f"holds a {type(content).__name__}, not the dict of a CIFAR batch")
    return {_text(key): value for key, value in content.items()}


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _field(batch: dict[str, Any], keys: tuple[str, ...], file: Path) -> Any:
    for key in keys:
        if key in batch:
            return batch[key]
    raise UserError("data", file, f"has no {' or '.join(keys)}, only {', '.join(batch)}; take the original file")


def _pixels(data: object, file: Path) -> np.ndarray:
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        kind = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise UserError("data", file, f"data is {kind}; must be uint8 [N, 3072]")
    return data.reshape(-1, 3, 32, 32)


def _in_tar(path: Path) -> dict[str, Callable[[], bytes]]:
    """The files of an archive by their last name, each read into memory when asked for: nothing is written to disk."""
    try:
        with tarfile.open(path) as archive:
            members = [member for member in archive.getmembers() if member.isfile()]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError("data", path, f"not a whole tar archive ({error}); copy it again") from None

    def read(member: tarfile.TarInfo) -> bytes:
        with tarfile.open(path) as archive:
            file = archive.extractfile(member)
            assert file is not None  # a regular file
            return file.read()

    return {Path(member.name).name: lambda member=member: read(member) for member in members}
