"""Reads CIFAR-10 and CIFAR-100 as their authors publish them: Python pickles, in a folder or a tar archive.

A pickle can run any code. These pickles hold NumPy arrays and plain containers, so anything else is refused.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tadperf.data.archives import CheckedMember
from tadperf.data.layout import Content, Layout, ReadOptions, index_labels
from tadperf.data.parsing import parser_errors, reason, require_size
from tadperf.errors import UserError

CIFAR10 = {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)}
CIFAR100 = {"train": ("train",), "test": ("test",)}


FINE, COARSE = ("fine_labels", "labels"), ("coarse_labels",)  # the keys of the labels in a batch
COARSE_CLASSES = 20


def holds_cifar(path: Path) -> bool:
    """Returns whether a folder holds the pickles of CIFAR-10 or CIFAR-100."""
    names = ("data_batch_1", "test_batch", "batches.meta", "meta", "train", "test")
    return any((path / name).is_file() for name in names)


def read_cifar(path: Path, options: ReadOptions) -> Layout:
    """Reads a folder or .tar.gz: data_batch_1..5, test_batch, batches.meta, or train, test, meta.

    CIFAR-100 has 100 fine classes, and 20 coarse ones for options.label_column = "coarse_label".

    Without the meta file the classes are named "0".."C-1". Raises UserError on a missing or damaged file, and on a
    pickle that holds anything but arrays and plain containers. No code in a pickle runs.
    """
    files = _in_tar(path) if path.is_file() else {f.name: f.read_bytes for f in sorted(path.iterdir()) if f.is_file()}
    batches, meta, key, classes = CIFAR10, "batches.meta", "label_names", 10
    if CIFAR10["train"][0] not in files and CIFAR10["test"][0] not in files:
        batches, meta, key, classes = CIFAR100, "meta", "fine_label_names", 100
    labels_of = _label_keys(options.label_column, batches is CIFAR100)
    if labels_of is COARSE:
        key, classes = "coarse_label_names", COARSE_CLASSES
    names = tuple(map(str, range(classes)))
    if meta in files:
        names = _class_names(_field(_load(files[meta](), path / meta), (key,), path / meta), path / meta)
    splits = {split: parts for split, parts in batches.items() if any(name in files for name in parts)}
    if not splits:
        raise UserError("data", path, "holds neither data_batch_1..5 and test_batch nor train and test of CIFAR")

    def read(split: str) -> Content:
        images, labels = [], []
        for name in splits[split]:
            if name not in files:
                raise UserError("data", path / name, "is missing, but other batches exist; add it")
            batch = _load(files[name](), path / name)
            images.append(_pixels(_field(batch, ("data",), path / name), path / name))
            labels.append(_labels(_field(batch, labels_of, path / name), path / name))
            if len(images[-1]) != len(labels[-1]):
                raise UserError("data", path / name, f"{len(images[-1])} images but {len(labels[-1])} labels")
        _, indexed = index_labels({split: np.concatenate(labels)}, names, str(path))
        return Content(torch.from_numpy(np.concatenate(images)), indexed[split])

    return Layout(names, {split: lambda split=split: read(split) for split in splits})


def _label_keys(column: str | None, has_coarse: bool) -> tuple[str, ...]:
    """Returns the keys of the labels that the option label_column names, with or without an s at its end."""
    name = (column or FINE[0]).rstrip("s") + "s"
    if name in COARSE and has_coarse:
        return COARSE
    if name not in FINE:
        remedy = "CIFAR-100 has fine_label and coarse_label" if has_coarse else "CIFAR-10 has one kind of label"
        raise UserError("data.label_column", column, remedy)
    return FINE


def restricted_load(data: bytes) -> Any:
    """Unpickles arrays and plain containers. Raises pickle.UnpicklingError on anything else, and runs no code."""
    _require_small_memo(data)
    content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    if isinstance(content, dict):
        return {key: value.array if isinstance(value, _Array) else value for key, value in content.items()}
    return content.array if isinstance(content, _Array) else content


class _Dtype:
    """Stands in for a pickled numpy.dtype of numbers. NumPy's own class would not check the state in the pickle."""

    def __init__(self, spec: str, *flags: object):
        self.dtype = np.dtype(str(spec))
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"it holds an array of {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for a pickled numpy.ndarray: makes the array from the shape, type and bytes in the pickle."""

    def __init__(self, *empty: object):
        self.array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 pickles bytes as str
        self.array = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C").copy()


def _require_small_memo(data: bytes) -> None:
    """Refuses a memo index above the number of bytes: Python would allocate memory up to this index."""
    try:
        for code, argument, _ in pickletools.genops(data):
            if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
                raise pickle.UnpicklingError("it asks for a huge memo")
    except ValueError:
        return  # damaged: the unpickler says where


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}")
    return text.encode("latin1")


# What NumPy's pickles name. Python 3 pickles bytes in protocol 2 as _codecs.encode(text, "latin1").
_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct; it is never called
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = module.replace("numpy._core", "numpy.core"), name  # the spellings of NumPy 2 and 1
        if known not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _KNOWN[known]


def _load(data: bytes, file: Path) -> dict[str, Any]:
    """Unpickles a dict and converts its keys to text."""
    try:
        content = restricted_load(data)
    except pickle.UnpicklingError as error:
        raise UserError("data", file, f"refused as unsafe ({reason(error)}); use the original file") from None
    except Exception as error:  # a damaged pickle can raise nearly any exception
        raise UserError(
            "data", file, f"damaged pickle ({type(error).__name__}: {reason(error)}); copy it again"
        ) from None
    if not isinstance(content, dict):
        raise UserError("data", file, f"holds a {type(content).__name__}, not the dict of a CIFAR batch")
    return {_text(key): value for key, value in content.items()}


def _class_names(names: object, file: Path) -> tuple[str, ...]:
    if not isinstance(names, (list, tuple)):
        raise UserError("data", file, f"class names are a {type(names).__name__}, not a list; use the original file")
    return tuple(map(_text, names))


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _field(batch: dict[str, Any], keys: tuple[str, ...], file: Path) -> Any:
    for key in keys:
        if key in batch:
            return batch[key]
    raise UserError("data", file, f"has no {' or '.join(keys)}, only {', '.join(batch)[:200]}; use the original file")


def _labels(values: object, file: Path) -> np.ndarray:
    with parser_errors("list of labels", file, "use the original file"):
        array = np.asarray(values)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"{array.dtype} {list(array.shape)}")
    return array


def _pixels(data: object, file: Path) -> np.ndarray:
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        kind = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise UserError("data", file, f"data is {kind}; must be uint8 [N, 3072]")
    return data.reshape(-1, 3, 32, 32)


def _in_tar(path: Path) -> dict[str, Callable[[], bytes]]:
    """Returns a reader for each file of an archive, by file name without folders. Writes nothing to disk."""
    with parser_errors("tar archive", path), tarfile.open(path, tarinfo=CheckedMember) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]

    def read(member: tarfile.TarInfo) -> bytes:
        name = path / member.name
        require_size(name, (member.size,), 1, path.stat().st_size, compressed=True)
        with (
            parser_errors("file in a tar archive", name, file=path),
            tarfile.open(path, tarinfo=CheckedMember) as archive,
        ):
            file = archive.extractfile(member)
            assert file is not None  # a regular file
            return file.read()

    return {Path(member.name).name: lambda member=member: read(member) for member in members}
