"""Opens a file of labels on its own, for an audit without images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tadperf.data.label_table import CLEAN, FIELD, FILES, IDS, INDICES, LABELS, read_rows
from tadperf.data.labels import locate_labels, read_label_array
from tadperf.data.layout import as_numpy
from tadperf.data.text import display_name, nfc
from tadperf.errors import UserError, warn_user

KNOWN = {*LABELS, *CLEAN, *FILES, *IDS, *(name for name in INDICES if name)}


@dataclass(frozen=True)
class LabelSet:
    """Labels without images. Has the fields of a `Dataset`; images is None, and none is broken.

    rows: int64 [N], the row of each sample in the file, if samples without a label are left out. opened: the number of
    rows in the file.
    """

    labels: Tensor
    class_names: tuple[str, ...]
    name: str
    file_names: tuple[str, ...] | None = None
    clean_labels: Tensor | None = None
    source: dict[str, Any] = field(default_factory=dict)
    rows: Tensor | None = None
    opened: int = 0
    images: None = None
    broken: tuple[()] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def open_label_file(spec: str, count: int | None = None, classes: int | None = None) -> LabelSet:
    """Opens CSV, TSV, JSON, .npy or .pt:key as a `LabelSet`.

    A CSV has a column of labels (`label_table.LABELS`), optionally clean labels (CLEAN), file names or ids (FILES, IDS)
    and an index 0..N-1 that puts the rows in order (INDICES); other columns are ignored. Integers are class numbers.
    Other labels are class names, numbered in sorted order. A row with an empty label is left out.
    count: the number of rows that the file must have. classes: the number of classes; None derives it from the labels.
    Raises UserError on a wrong file, number of rows, or label, and if there is only one class.
    """
    path, suffix, key = locate_labels(spec)
    names: list[str] | None = None
    if suffix in (".csv", ".tsv"):
        given, clean, names = _read_table(path, spec, count)
    else:
        array = read_label_array(path, suffix, key, spec)
        given, clean = _values(array.labels, spec), None if array.clean is None else _values(array.clean, spec)
    if count is not None and len(given) != count:
        raise UserError(FIELD, spec, f"has {len(given)} labels for {count} rows; must have one label for each row")
    opened, kept = len(given), [row for row, value in enumerate(given) if value != ""]
    if not kept:
        raise UserError(FIELD, spec, "all labels are empty")
    rows = None if len(kept) == opened else torch.tensor(kept)
    if rows is not None:
        warn_user(f"{FIELD}: {opened - len(kept)} of {opened} samples have an empty label and are left out")
        given = [given[row] for row in kept]
        clean = None if clean is None else [clean[row] for row in kept]
        names = None if names is None else [names[row] for row in kept]
    class_names, labels = _number(given, clean, spec, classes)
    return LabelSet(
        labels[: len(given)],
        class_names,
        display_name(path.stem),
        None if names is None else tuple(names),
        None if clean is None else labels[len(given) :],
        {"path": str(path.absolute())},
        rows,
        opened,
    )


def _values(values: Any, spec: str) -> list[Any]:
    """Returns integers or texts as a list. Raises UserError for other types and shapes."""
    array = as_numpy(values) if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iuUO":
        kind = f"{array.dtype} {list(array.shape)}"
        raise UserError(FIELD, spec, f"holds {kind}; must be one list of integers or class names")
    return array.tolist()


def _read_table(path: Path, spec: str, count: int | None) -> tuple[list[str], list[str] | None, list[str] | None]:
    """Returns labels, clean labels and names of the samples, in the order of the column index if there is one."""
    lines, rows = read_rows(path, spec)
    header = [cell.strip().lower() for cell in rows[0]]
    has_header = bool(set(header) & KNOWN) or (len(header) == 1 and len(rows) - 1 == count)
    if not has_header and len(header) > 1:
        raise UserError(FIELD, spec, "has several columns and no header that names one 'label'; add a header")
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(header):
            raise UserError(FIELD, spec, f"line {line} has {len(row)} columns; the first line has {len(header)}")
    rows = rows[1:] if has_header else rows
    if not rows:
        raise UserError(FIELD, spec, "has a header and no labels")
    columns = {name: [row[k].strip() for row in rows] for k, name in enumerate(header)}
    if len(header) == 1:
        columns = {"label": next(iter(columns.values()))}
    label = next((name for name in LABELS if name in columns), None)
    if label is None:
        remedy = f"has no column of labels, only {', '.join(columns)[:200]}; name the column of labels 'label'"
        raise UserError(FIELD, spec, remedy)
    clean = next((columns[name] for name in CLEAN if name in columns), None)
    order, indexed = _order(columns, spec)
    named = next((name for name in (*FILES, *IDS) if name in columns and name not in (label, indexed)), None)

    def sort(values: list[str] | None) -> list[str] | None:
        return values if values is None or order is None else [values[row] for row in order]

    return sort(columns[label]) or [], sort(clean), sort(columns[named]) if named else None


def _order(columns: dict[str, list[str]], spec: str) -> tuple[list[int] | None, str | None]:
    """Returns the row of each sample by the column index, and the name of that column; None keeps the file's order."""
    for name in (*INDICES, *IDS):
        if name not in columns:
            continue
        position = {int(text): row for row, text in enumerate(columns[name]) if text.isdecimal()}
        if set(position) == set(range(len(columns[name]))):
            return [position[k] for k in range(len(position))], name
        if name in INDICES and name:
            remedy = f"column {name} must hold all of 0..{len(columns[name]) - 1} once; name it 'id' if it is no order"
            raise UserError(FIELD, spec, remedy)
    return None, None


def _number(
    given: Sequence[Any], clean: Sequence[Any] | None, spec: str, classes: int | None
) -> tuple[tuple[str, ...], Tensor]:
    """Returns the class names, and the numbers of the given labels followed by those of the clean labels."""
    values = [*given, *(clean or [])]
    try:
        labels = torch.tensor([int(value) for value in values])
    except (ValueError, TypeError, RuntimeError):
        texts = [nfc(str(value)) for value in values]
        class_names = tuple(sorted(set(texts)))
        number = {name: k for k, name in enumerate(class_names)}
        labels = torch.tensor([number[text] for text in texts])
        if classes not in (None, len(class_names)):
            remedy = f"names {len(class_names)} classes, the probabilities have {classes} columns; use class numbers"
            raise UserError(FIELD, spec, remedy) from None
    else:
        limit = len(labels) if classes is None else classes
        wrong = ((labels < 0) | (labels >= limit)).nonzero()
        if len(wrong):
            value = f"holds {int(labels[wrong[0]])} in row {int(wrong[0]) % len(given)}"
            raise UserError(FIELD, spec, f"{value}; labels must be class numbers 0..{limit - 1}, or class names")
        class_names = tuple(map(str, range(classes or int(labels.max()) + 1)))
    if len(labels[: len(given)].unique()) < 2:
        raise UserError(FIELD, spec, f"has only one class, {class_names[int(labels[0])]!r}; must have two or more")
    return class_names, labels
