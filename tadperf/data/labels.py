"""Replaces the labels of a set with those in a file."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tadperf.data import mapped
from tadperf.data.dataset import Dataset
from tadperf.data.label_table import read_rows, read_table
from tadperf.data.layout import as_numpy
from tadperf.data.npy import read_npy
from tadperf.data.parsing import parser_errors, reason, require_size
from tadperf.data.text import nfc
from tadperf.errors import UserError, warn_user

FIELD = "--labels"
SUFFIXES = (".csv", ".tsv", ".json", ".npy", ".pt", ".pth")
CLEAN = ("clean_label", "clean_coarse_label")  # the keys of CIFAR-N's true labels
MIN_KAPPA = 0.05  # between clean and given labels in one order; not tuned


class GivenLabels(NamedTuple):
    """The content of a file: labels [N], integers or class names, and the clean labels [N] if it has them.

    names_samples: whether the file says which sample each row belongs to; otherwise only the order of the rows does.
    """

    labels: Sequence[Any] | np.ndarray
    clean: Sequence[Any] | np.ndarray | None = None
    names_samples: bool = False


def replace_labels(dataset: Dataset, spec: str) -> Dataset:
    """Replaces the labels with those in a file. Clean labels in the file become the clean labels.

    The old labels do not become clean labels. A sample with an empty label is left out of the set; indices then count
    the samples that are left.
    spec: `file.csv` (see `label_table.read_table`; `TrustState.export` writes one), `file.json` (a list), `file.npy`
    (integers), or `file.pt:key` (a dict of arrays, as CIFAR-N publishes; the key is optional if only one fits).
    Raises UserError on a missing or damaged file, an unknown column or key, a wrong number of labels, or a label that
    is not a class. Clean labels in the file must equal those of the set: a difference is refused as another order of
    the rows. If the set has none and the file does not name the samples, they must agree with the old labels, which may
    be wrong in part, more often than by chance.
    """
    path, suffix, key = locate_labels(spec)
    dataset, given = _leave_out_unlabelled(
        dataset, _without_broken(_read(path, suffix, key, spec, dataset), dataset), spec
    )
    labels = _class_numbers(given.labels, dataset, "labels", spec)
    clean = dataset.clean_labels
    if given.clean is not None:
        clean = _class_numbers(given.clean, dataset, "clean labels", spec)
        if dataset.clean_labels is not None:
            _require_equal(clean, dataset.clean_labels, spec)
        elif not given.names_samples:
            _require_same_order(clean, dataset.labels, dataset.num_classes, spec)
    resolved = str(path.absolute()) + (f":{key}" if key else "")
    return replace(dataset, labels=labels, clean_labels=clean, source={**dataset.source, "labels": resolved})


def locate_labels(spec: str) -> tuple[Path, str, str | None]:
    """Returns the path, the ending and the key of `file.pt:key` or `file.csv`. Raises UserError for any other file."""
    path, key = _split_key(spec)
    if not path.is_file():
        raise UserError(FIELD, spec, f"no such file; name a file that ends in {', '.join(SUFFIXES)}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(FIELD, spec, f"must end in {', '.join(SUFFIXES)} (file.pt:key)")
    return path, suffix, key


def read_label_array(path: Path, suffix: str, key: str | None, spec: str) -> GivenLabels:
    """Reads a JSON, .npy or .pt file of labels."""
    if suffix == ".json":
        return _read_json(path, spec)
    return _read_npy(path, spec) if suffix == ".npy" else _read_pt(path, key, spec)


def count_labels(spec: str) -> int:
    """Returns the number of labels in a file for `replace_labels`. The header of a table counts as a label."""
    path, suffix, key = locate_labels(spec)
    if suffix in (".csv", ".tsv"):
        return len(read_rows(path, spec)[1])
    return len(read_label_array(path, suffix, key, spec).labels)


def require_every_class(dataset: Dataset, field: str, value: object) -> Dataset:
    """Returns the set. Raises UserError, which names the class, if a class has no sample: it could not be distilled."""
    counts = dataset.labels.bincount(minlength=dataset.num_classes).tolist()
    empty = [name for name, count in zip(dataset.class_names, counts, strict=True) if count == 0]
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(field, value, f"class {empty[0]!r}{more} has no training sample; add some or drop the class")
    return dataset


def _without_broken(given: GivenLabels, dataset: Dataset) -> GivenLabels:
    """Leaves out the labels of broken images, if there is a label for every image of the split."""
    count = len(dataset) + len(dataset.broken)
    if not dataset.broken or np.shape(given.labels)[:1] != (count,):
        return given
    rows = {image.row for image in dataset.broken}
    kept = [row for row in range(count) if row not in rows]
    clean = None if given.clean is None else [given.clean[row] for row in kept]
    return given._replace(labels=[given.labels[row] for row in kept], clean=clean)


def _leave_out_unlabelled(dataset: Dataset, given: GivenLabels, spec: str) -> tuple[Dataset, GivenLabels]:
    """Leaves out the samples with an empty label, and their labels."""
    if not isinstance(given.labels, list) or len(given.labels) != len(dataset) or "" not in given.labels:
        return dataset, given
    kept = [k for k, label in enumerate(given.labels) if label != ""]
    count = len(dataset) - len(kept)
    if not kept:
        raise UserError(FIELD, spec, "all labels are empty")
    if mapped.is_large(dataset.images.shape):  # the images that are left would be copied into memory
        remedy = f"{count} labels are empty, but the set is too large for memory; remove these images from the set"
        raise UserError(FIELD, spec, remedy)
    warn_user(f"{FIELD}: {count} of {len(dataset)} samples have an empty label and are left out")
    clean = None if given.clean is None else [given.clean[k] for k in kept]
    return dataset.subset(torch.tensor(kept)), given._replace(labels=[given.labels[k] for k in kept], clean=clean)


def _split_key(spec: str) -> tuple[Path, str | None]:
    """Splits `file.pt:key`."""
    match = re.fullmatch(r"(.+\.pth?)(?::([^:/\\]*))?", spec, re.IGNORECASE)
    path, key = match.groups() if match else (spec, None)
    return Path(path).expanduser(), key or None


def _read(path: Path, suffix: str, key: str | None, spec: str, dataset: Dataset) -> GivenLabels:
    if suffix in (".csv", ".tsv"):
        return GivenLabels(*read_table(path, spec, dataset))
    return read_label_array(path, suffix, key, spec)


def _read_json(path: Path, spec: str) -> GivenLabels:
    with parser_errors("JSON file", spec, "write a list of labels", FIELD, path):
        values = json.loads(path.read_bytes())
    if not isinstance(values, list) or not all(type(value) in (int, str) for value in values):
        raise UserError(FIELD, spec, "must be one JSON list of integers or class names, in the order of the samples")
    return GivenLabels(values)


def _read_npy(path: Path, spec: str) -> GivenLabels:
    with parser_errors(".npy file of numbers", spec, "write it with numpy.save", FIELD, path), open(path, "rb") as file:
        try:
            return GivenLabels(read_npy(file, spec, path.stat().st_size, field=FIELD))
        except UserError as error:
            if "pickled" not in error.remedy:
                raise
            remedy = "holds a pickled object, which can run code; save the labels alone, or use the .pt file"
            raise UserError(FIELD, spec, remedy) from None


def _read_pt(path: Path, key: str | None, spec: str) -> GivenLabels:
    """Reads CIFAR-N's dict of NumPy arrays. No code in the file runs."""
    reconstruct = np.empty(0).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # the names in NumPy 1 and 2
    dtypes = [type(np.dtype(kind)) for kind in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")]
    allowed = [*((reconstruct, f"{module}._reconstruct") for module in modules), np.ndarray, np.dtype, *dtypes]
    with parser_errors(".pt file", spec, "copy it again", FIELD, path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    require_size(spec, (member.file_size,), 1, member.compress_size, True, FIELD)
        try:
            with torch.serialization.safe_globals(allowed):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            lines = [line for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line]
            text = lines[0][:150] if lines else reason(error)
            raise UserError(
                FIELD, spec, f"refused, not a file of plain arrays ({text}); use the original file"
            ) from None
    if not isinstance(content, dict):
        content = {"labels": content}
    content = {str(name): values for name, values in content.items()}
    keys = [name for name in content if name not in CLEAN]
    if key is None and len(keys) != 1:
        raise UserError(FIELD, spec, f"choose the labels: {path.name}:KEY, with KEY one of {', '.join(keys)[:200]}")
    if key is not None and key not in content:
        raise UserError(FIELD, spec, f"has no {key!r}; it holds {', '.join(content)[:200]}")
    key = key or keys[0]
    return GivenLabels(content[key], content.get(CLEAN[1] if "coarse" in key else CLEAN[0]))


def _class_numbers(values: Any, dataset: Dataset, kind: str, spec: str) -> Tensor:
    """Converts integers or class names to int64 [N]. Raises UserError on a wrong number, type, name or range."""
    with parser_errors(f"list of {kind}", spec, "must be integers or class names", FIELD):
        array = as_numpy(values) if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != (len(dataset),):
        amount = f"{len(array)} {kind}" if array.ndim == 1 else f"{kind} of shape {list(array.shape)}"
        raise UserError(FIELD, spec, f"holds {amount}; {dataset.name} has {len(dataset)} training samples")
    if array.dtype.kind in "UO":
        array = _numbers_of_names(array, dataset.class_names, spec)
    if array.dtype.kind not in "iu":
        raise UserError(FIELD, spec, f"holds {kind} of {array.dtype}; must be integers or class names")
    wrong = np.flatnonzero((array < 0) | (array >= dataset.num_classes))
    if wrong.size:
        value = f"{kind} hold {array[wrong[0]]} at index {wrong[0]}"
        raise UserError(FIELD, spec, f"{value}; must be in 0..{dataset.num_classes - 1}")
    return torch.from_numpy(array.astype(np.int64))


def _numbers_of_names(array: np.ndarray, class_names: tuple[str, ...], spec: str) -> np.ndarray:
    """Converts text to class numbers: as class names if every value is one, else as integers."""
    number = {nfc(name): c for c, name in enumerate(class_names)}
    names = [nfc(str(value)) for value in array]
    unknown = next(((k, name) for k, name in enumerate(names) if name not in number), None)
    if unknown is None:
        return np.array([number[name] for name in names])
    try:
        return np.array([int(value) for value in array])
    except (ValueError, TypeError):
        row, name = unknown
        label = f"label {name!r}" if name else "the empty label"
        remedy = f"{label} at index {row} is not a class; the classes are {', '.join(class_names[:10])}"
        raise UserError(FIELD, spec, remedy) from None


def _require_equal(clean: Tensor, known: Tensor, spec: str) -> None:
    differ = (clean != known).nonzero().squeeze(1)
    if len(differ):
        count = f"{len(differ)} of {len(known)} samples, first at index {int(differ[0])}"
        remedy = f"its clean labels differ from those of the set in {count}: the rows are in another order"
        raise UserError(FIELD, spec, remedy)


def _require_same_order(clean: Tensor, labels: Tensor, classes: int, spec: str) -> None:
    """Raises UserError if clean labels agree with the given labels no better than rows in a random order would.

    The measure is Cohen's kappa: 0 for a random order, 1 for equal labels, 0.11 for 10 classes with 80 % random labels.
    """
    agreement = float((clean == labels).double().mean())
    shares = [x.bincount(minlength=classes) / len(labels) for x in (clean, labels)]
    chance = float((shares[0] * shares[1]).sum())
    if agreement < 1 and agreement - chance < MIN_KAPPA * (1 - chance):
        remedy = f"its clean labels agree with {agreement:.0%} of the set's labels, {chance:.0%} do by chance: the rows"
        raise UserError(FIELD, spec, f"{remedy} are in another order; add a column file or index")
