"""Labels from a file in place of a set's own."""

from __future__ import annotations

import csv
import pickle
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tadperf.data.dataset import Dataset
from tadperf.data.layout import as_numpy
from tadperf.errors import UserError

COLUMNS = ("label", "given_label", "clean_label", "index")


class Given(NamedTuple):
    """What a file says: labels [N], integers or class names, and clean labels [N] where it has them."""

    labels: Sequence[Any] | np.ndarray
    clean: Sequence[Any] | np.ndarray | None = None


def replace_labels(dataset: Dataset, spec: str) -> Dataset:
    """The set under the labels of a file; its clean labels become the set's, else the set's own are NOT taken as clean.

    spec: `file.csv` (columns label or given_label, optionally index and clean_label, or one bare column; integers or
    class names), `file.npy` (integers), or `file.pt:key` (a dict of arrays, as CIFAR-N publishes; the key may be left
    out where only one fits). Raises UserError on a missing or damaged file, an unknown key, another length, a label out
    of range, and on clean labels that are not the set's own: the rows are then in another order.
    """
    path, key = _split_key(spec)
    if not path.is_file():
        raise UserError("--labels", spec, "no such file; name a .csv, .npy or .pt file")
    readers = {".csv": _read_csv, ".npy": _read_npy, ".pt": _read_pt, ".pth": _read_pt}
    if path.suffix.lower() not in readers:
        raise UserError("--labels", spec, "must be a .csv, .npy or .pt file (file.pt:key)")
    given = readers[path.suffix.lower()](path, key, spec)
    labels = _index(given.labels, dataset, "labels", spec)
    clean = dataset.clean_labels
    if given.clean is not None:
        clean = _index(given.clean, dataset, "clean labels", spec)
        _require_same_order(clean, dataset.labels if dataset.clean_labels is None else dataset.clean_labels, spec)
    resolved = str(path.absolute()) + (f":{key}" if key else "")
    return replace(dataset, labels=labels, clean_labels=clean, source={**dataset.source, "labels": resolved})


def require_every_class(dataset: Dataset, field: str, value: object) -> Dataset:
    """The set itself; raises UserError, naming the class, where one has no sample (it could not be distilled)."""
    counts = dataset.labels.bincount(minlength=dataset.num_classes).tolist()
    empty = [name for name, count in zip(dataset.class_names, counts, strict=True) if count == 0]
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(field, value, f"class {empty[0]!r}{more} has no training sample; add some or drop the class")
    return dataset


def _split_key(spec: str) -> tuple[Path, str | None]:
    """`file.pt:key` to its parts."""
    match = re.fullmatch(r"(.+\.pth?)(?::([^:/\\]*))?", spec, re.IGNORECASE)
    path, key = match.groups() if match else (spec, None)
    return Path(path).expanduser(), key or None


def _read_csv(path: Path, key: str | None, spec: str) -> Given:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError("--labels", spec, f"not a CSV file in UTF-8 ({error})") from None
    if not rows:
        raise UserError("--labels", spec, "is empty")
    head = [cell.strip().lower() for cell in rows[0]]
    if not set(head) & set(COLUMNS):
        if len(head) > 1:
            raise UserError("--labels", spec, "has several columns and no header; name them label, index, clean_label")
        head, rows = ["label"], [head, *rows]
    wide = next((k for k, row in enumerate(rows) if len(row) != len(head)), None)
    if wide is not None:
        raise UserError("--labels", spec, f"line {wide + 1} has {len(rows[wide])} columns; the header has {len(head)}")
    columns = {name: [row[k].strip() for row in rows[1:]] for k, name in enumerate(head)}
    labels = columns.get("label", columns.get("given_label"))
    if labels is None:
        raise UserError("--labels", spec, f"has no column label or given_label, only {', '.join(head)}")
    order = _order(columns["index"], spec) if "index" in columns else range(len(labels))
    clean = columns.get("clean_label")
    return Given([labels[k] for k in order], clean and [clean[k] for k in order])


def _order(index: list[str], spec: str) -> list[int]:
    """Where the row of each sample stands, from the column of their indices: 0..N-1 in any order."""
    try:
        place = {int(text): k for k, text in enumerate(index)}
    except ValueError:
        raise UserError("--labels", spec, "column index must hold integers") from None
    missing = next((k for k in range(len(index)) if k not in place), None)
    if missing is not None:
        raise UserError("--labels", spec, f"column index must hold all of 0..{len(index) - 1}; {missing} is missing")
    return [place[k] for k in range(len(index))]


def _read_npy(path: Path, key: str | None, spec: str) -> Given:
    try:
        return Given(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise UserError("--labels", spec, f"not a whole .npy file of numbers ({error})") from None


def _read_pt(path: Path, key: str | None, spec: str) -> Given:
    """CIFAR-N's dict of NumPy arrays, without letting any code in it run."""
    reconstruct = np.empty(0).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since NumPy 2
    dtypes = [type(np.dtype(kind)) for kind in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")]
    allowed = [*((reconstruct, f"{module}._reconstruct") for module in modules), np.ndarray, np.dtype, *dtypes]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line), "")
        raise UserError("--labels", spec, f"refused, not a file of plain arrays {reason[:150]}".rstrip()) from None
    except Exception as error:  # a damaged archive can raise nearly anything
        text = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError("--labels", spec, f"cannot be read ({text}); copy the file again") from None
    if not isinstance(content, dict):
        content = {"labels": content}
    content = {str(name): values for name, values in content.items()}
    clean = content.get("clean_label")
    keys = [name for name in content if name != "clean_label"]
    if key is None and len(keys) != 1:
        raise UserError("--labels", spec, f"name the labels wanted, {path.name}:KEY, KEY one of {', '.join(keys)}")
    if key is not None and key not in content:
        raise UserError("--labels", spec, f"has no {key!r}; it holds {', '.join(content)}")
    return Given(content[key or keys[0]], clean)


def _index(values: Any, dataset: Dataset, what: str, spec: str) -> Tensor:
    """Integers or class names to int64 [N]; raises UserError on another length, type, name or range."""
    array = as_numpy(values) if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != (len(dataset),):
        found = f"{len(array)} {what}" if array.ndim == 1 else f"{what} of shape {list(array.shape)}"
        raise UserError("--labels", spec, f"holds {found}; {dataset.name} has {len(dataset)} training samples")
    if array.dtype.kind in "UO":
        array = _by_name(array, dataset.class_names, spec)
    if array.dtype.kind not in "iu":
        raise UserError("--labels", spec, f"holds {what} of {array.dtype}; must be integers or class names")
    wrong = np.flatnonzero((array < 0) | (array >= dataset.num_classes))
    if wrong.size:
        first = int(wrong[0])
        raise UserError(
            "--labels", spec, f"{what} hold {array[first]} at index {first}; must be in 0..{dataset.num_classes - 1}"
        )
    return torch.from_numpy(array.astype(np.int64))


def _by_name(array: np.ndarray, class_names: tuple[str, ...], spec: str) -> np.ndarray:
    """Text to class numbers: by class name where every value is one, else as integers."""
    place = {name: c for c, name in enumerate(class_names)}
    unknown = next(((k, str(value)) for k, value in enumerate(array) if str(value) not in place), None)
    if unknown is None:
        return np.array([place[str(value)] for value in array])
    try:
        return np.array([int(value) for value in array])
    except (ValueError, TypeError):
        some = ", ".join(class_names[:10])
        row, value = unknown
        raise UserError("--labels", spec, f"label {value!r} at index {row} is no class; they are {some}") from None


def _require_same_order(clean: Tensor, own: Tensor, spec: str) -> None:
    differ = (clean != own).nonzero().squeeze(1)
    if len(differ):
        raise UserError(
            "--labels",
            spec,
            f"its clean labels differ from the set's own in {len(differ)} of {len(own)} samples, first at index "
            f"{int(differ[0])}: it is for another order of the samples",
        )
