"""Reads labels from a CSV table and finds the sample that each row belongs to."""

from __future__ import annotations

import csv
import io
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tadperf.data.dataset import Dataset
from tadperf.data.parsing import is_lfs_pointer
from tadperf.data.path_ends import ends_of_paths
from tadperf.data.text import nfc
from tadperf.errors import UserError

FIELD = "--labels"
# Known words in a header, in lower case. The first of LABELS that a table has is its label column.
LABELS = (
    "label",
    "given_label",
    "labels",
    "noisy_label",
    "target",
    "targets",
    "class",
    "class_name",
    "class_id",
    "category",
    "y",
)
CLEAN = ("clean_label", "clean_labels", "true_label")
FILES = ("filename", "file_name", "file", "filepath", "file_path", "path", "image", "image_path", "img", "name")
INDICES = ("index", "idx", "")  # pandas writes its index without a name
IDS = ("id", "image_id", "sample_id")  # a file name or an index, by its values
# Columns that tadperf writes and that hold no label to read.
AUDIT = ("verdict", "score", "given_label", "suggested_label", "reliability", "round")
AUDIT += ("given_number", "suggested_number", "label_number")
SEPARATORS = (",", ";", "\t")
SNIFFED_ROWS = 20  # lines that decide on the separator; not tuned


class Table(NamedTuple):
    """Columns by their names in lower case, and the line of the file on which each row ends."""

    columns: dict[str, list[str]]
    lines: list[int]


def read_table(path: Path, spec: str, dataset: Dataset) -> tuple[list[str], list[str] | None, bool]:
    """Returns the labels of a CSV file in the order of the samples, its clean labels, and if rows name their samples.

    The file has one column of labels without a header, or a header and these columns: a label (LABELS), optionally a
    clean label (CLEAN), and optionally the sample of the row, as a file name (FILES), an index 0..N-1 (INDICES) or
    either (IDS). Without a column for the sample, the rows must be in the order of the samples. The separator is a
    comma, a semicolon or a tab. Raises UserError on an unknown column, on a row without a sample and on a sample
    without a row.
    """
    table = _parse(path, spec, dataset)
    columns = table.columns
    label = next((name for name in LABELS if name in columns), None)
    if label is None:
        listed = ", ".join(columns)[:200]
        raise UserError(FIELD, spec, f"has no column of labels, only {listed}; name the column of labels 'label'")
    known = {label, *CLEAN, *FILES, *INDICES, *IDS, *(AUDIT if "verdict" in columns else ("given_label",))}
    unknown = next((name for name in columns if name not in known), None)
    if unknown is not None:
        remedy = f"column {unknown!r} is unknown; remove it, or name the columns label, clean_label, file, index"
        raise UserError(FIELD, spec, remedy)
    order = _order(table, spec, dataset)
    clean = next((columns[name] for name in CLEAN if name in columns), None)
    named = any(name in columns for name in (*FILES, *IDS, *INDICES) if name)
    return [columns[label][k] for k in order], None if clean is None else [clean[k] for k in order], named


def read_rows(path: Path, spec: str, field: str = FIELD) -> tuple[list[int], list[list[str]]]:
    """Returns the lines on which the rows of a CSV file end, and the rows, without empty ones.

    spec, field: named in errors.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        separator = _separator(text)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        lines, rows = _rows_with_lines(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(field, spec, f"not a CSV file in UTF-8 ({error})") from None
    except OSError as error:
        raise UserError(field, spec, f"cannot be read ({error.strerror})") from None
    if is_lfs_pointer(path):
        raise UserError(field, spec, "a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")
    if not rows:
        raise UserError(field, spec, "is empty")
    return lines, rows


def _parse(path: Path, spec: str, dataset: Dataset) -> Table:
    lines, rows = read_rows(path, spec)
    header = [cell.strip().lower() for cell in rows[0]]
    has_header = _is_header(header, rows, dataset)
    if not has_header and len(header) > 1:
        raise UserError(FIELD, spec, "has several columns and no header; name them label, file, index, clean_label")
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(header):
            first = "header" if has_header else "first line"
            raise UserError(FIELD, spec, f"line {line} has {len(row)} columns; the {first} has {len(header)}")
    if len(header) == 1:
        header = ["label"]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(FIELD, spec, f"has two columns named {twice!r}; remove one")
    if has_header:
        lines, rows = lines[1:], rows[1:]
    return Table({name: [row[k].strip() for row in rows] for k, name in enumerate(header)}, lines)


def _rows_with_lines(reader: Any) -> tuple[list[int], list[list[str]]]:
    """Returns the rows of a csv.reader that are not empty, and the lines on which they end."""
    numbered = [(reader.line_num, row) for row in reader if row]
    return [line for line, _ in numbered], [row for _, row in numbered]


def _separator(text: str) -> str:
    """Returns the separator that gives the first rows the same number of columns, at least two; else a comma."""
    lines = text.splitlines()[:SNIFFED_ROWS]
    best, columns = ",", 1
    for separator in SEPARATORS:
        counts = {len(row) for row in csv.reader(lines, delimiter=separator) if row}
        if len(counts) == 1 and (count := counts.pop()) > columns:
            best, columns = separator, count
    return best


def _is_header(cells: list[str], rows: list[list[str]], dataset: Dataset) -> bool:
    """Returns whether the first row is a header.

    A header has a known word, or is the extra row of a single column and not a label.
    """
    known = {*LABELS, *CLEAN, *FILES, *INDICES[:-1], *IDS}
    if set(cells) & known and not (len(cells) == 1 and _is_label(rows[0][0], dataset)):
        return True
    return len(cells) == 1 and not _is_label(rows[0][0], dataset) and len(rows) == len(dataset) + 1


def _is_label(text: str, dataset: Dataset) -> bool:
    text = text.strip()
    return nfc(text) in map(nfc, dataset.class_names) or text.lstrip("+-").isdigit()


def _order(table: Table, spec: str, dataset: Dataset) -> list[int]:
    """Returns the row of each sample. All columns that say which sample a row belongs to must agree."""
    orders: dict[str, list[int]] = {}
    for name, values in table.columns.items():
        by_file = name in FILES or (name in IDS and dataset.file_names is not None and not _is_index(values))
        if by_file:
            orders[name] = _rows_by_file(table, name, spec, dataset)
        elif name in IDS or name in INDICES:
            orders[name] = _rows_by_index(values, name, spec)
    if len(orders) > 1 and orders.get("") == list(range(len(table.lines))):
        del orders[""]  # pandas' row numbers say nothing about the samples
    first = next(iter(orders), None)
    if first is None:
        return list(range(len(table.lines)))
    other = next((name for name, order in orders.items() if order != orders[first]), None)
    if other is not None:
        raise UserError(FIELD, spec, f"columns {first!r} and {other!r} name different samples; remove one of them")
    return orders[first]


def _is_index(values: list[str]) -> bool:
    return all(value.isdigit() for value in values) and {int(value) for value in values} == set(range(len(values)))


def _rows_by_index(values: list[str], column: str, spec: str) -> list[int]:
    """Returns the row of each sample from a column that holds 0..N-1 in any order."""
    title = f"column {column}" if column else "the column without a name"
    try:
        row = {int(text): k for k, text in enumerate(values)}
    except ValueError:
        raise UserError(FIELD, spec, f"{title} must hold integers") from None
    missing = next((k for k in range(len(values)) if k not in row), None)
    if missing is not None:
        raise UserError(FIELD, spec, f"{title} must hold all of 0..{len(values) - 1}; {missing} is missing")
    return [row[k] for k in range(len(values))]


def _rows_by_file(table: Table, column: str, spec: str, dataset: Dataset) -> list[int]:
    """Returns the row of each sample from a column of file names.

    A name is a path or the end of a path, with or without suffix. It must match exactly one file. Rows of
    broken images, which are left out of the set, are ignored.
    """
    if dataset.file_names is None:
        remedy = f"column {column!r} names files, but {dataset.name} has no file names; use a column index"
        raise UserError(FIELD, spec, remedy)
    values, lines = table.columns[column], table.lines
    names = [PurePosixPath(nfc(value.replace("\\", "/"))) for value in values]
    images = (*dataset.file_names, *(image.name for image in dataset.broken))
    whole = {name: i for i, name in enumerate(images)}
    row: dict[int, int] = {}
    tables: dict[tuple[int, bool], dict[str, list[int]]] = {}
    for k, name in enumerate(names):
        parts = [part for part in name.parts if part not in ("/", ".")]
        exact = whole.get(nfc(values[k]))
        samples = _samples_of(parts, images, tables) if exact is None else [exact]
        if len(samples) != 1:
            files = [images[i] for i in samples[:2]]
            problem = f"could be {' or '.join(files)}; write the folder too" if samples else "is no training image"
            raise UserError(FIELD, spec, f"line {lines[k]}: file {values[k]!r} {problem}")
        if samples[0] >= len(dataset):
            continue  # a broken image, which is left out
        if samples[0] in row:
            pair = f"lines {lines[row[samples[0]]]} and {lines[k]}"
            raise UserError(FIELD, spec, f"{pair} name the same file {values[k]!r}")
        row[samples[0]] = k
    missing = next((i for i in range(len(dataset)) if i not in row), None)
    if missing is not None:
        count = f"{len(dataset) - len(row)} of {len(dataset)} training images have no row"
        first = repr(dataset.file_names[missing])
        raise UserError(FIELD, spec, f"{count}, first {first}; add them, with an empty label to leave them out")
    return [row[i] for i in range(len(dataset))]


def _samples_of(
    parts: list[str], file_names: tuple[str, ...], tables: dict[tuple[int, bool], dict[str, list[int]]]
) -> list[int]:
    """Returns the samples whose path ends in these parts, with its suffix or, if there are none, without it.

    Uses the longest end of the given path that matches a file: "/home/me/data/train/a/1.png" finds "train/a/1.png".
    """
    deepest = max(name.count("/") for name in file_names) + 1
    for length in range(min(len(parts), deepest), 0, -1):
        for with_suffix in (True, False):
            table = tables.get((length, with_suffix))
            if table is None:
                table = tables[length, with_suffix] = ends_of_paths(file_names, length, with_suffix)
            samples = table.get("/".join(parts[-length:]))
            if samples:
                return samples
    return []
