"""Reads a table that lists image files and their labels: a CSV or TSV file with the columns path, label and split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tadperf.data.image_paths import ImageFinder
from tadperf.data.label_table import CLEAN, FILES, IDS, LABELS, read_rows
from tadperf.data.layout import Layout, ReadOptions
from tadperf.data.readers.image_files import LabelledFile, files_layout
from tadperf.data.splits import choose_splits, split_of_folder
from tadperf.data.text import nfc
from tadperf.errors import UserError, warn_user

IMAGES = (*FILES, *IDS, "fname", "photo", "picture")
MAX_DIGITS = 10  # of a class number
SPLITS = ("split", "subset", "set", "partition")


def read_image_table(path: Path, options: ReadOptions) -> Layout:
    """Reads a table with a header: an image (IMAGES), a label (LABELS), and if it has them a split and a clean label.

    The images are relative to options.image_root, by default the folder of the table (`ImageFinder`). Labels are class
    names; the integers 0..C-1 are class numbers. Without a column for the split, all rows are the train split. Rows
    without a label are left out. Raises UserError on a missing column, and on a row whose image or split is wrong.
    """
    columns, lines = _read_columns(path, options)
    image = _column(columns, options.image_column, IMAGES, path, "images", "data.image_column")
    label = _column(columns, options.label_column, LABELS, path, "labels", "data.label_column")
    split = next((name for name in SPLITS if name in columns and name not in (image, label)), None)
    kept = [row for row, text in enumerate(columns[label]) if text]
    if not kept:
        raise UserError("data", path, f"column {label!r} is empty")
    if len(kept) < len(lines):
        warn_user(f"data: {path}: {len(lines) - len(kept)} of {len(lines)} rows have no label and are left out")
    lines = [lines[row] for row in kept]
    columns = {name: [values[row] for row in kept] for name, values in columns.items()}
    root = Path(options.image_root).expanduser().absolute() if options.image_root else path.parent
    finder = ImageFinder(root)
    files = [finder.find(name, f"{path}: line {line}") for name, line in zip(columns[image], lines, strict=True)]
    _require_distinct(files, lines, path)
    clean = next((name for name in CLEAN if name in columns and name != label), None)
    class_names = class_names_of(columns[label] + (columns[clean] if clean else []))
    number = {name: c for c, name in enumerate(class_names)}
    labels = [number[nfc(text)] for text in columns[label]]
    clean_labels = [number[nfc(text)] for text in columns[clean]] if clean else [None] * len(labels)
    rows = [LabelledFile(*values) for values in zip(files, labels, clean_labels, strict=True)]
    return files_layout(root, class_names, _by_split(rows, columns[split] if split else None, lines, path), options)


def class_names_of(labels: Sequence[str]) -> tuple[str, ...]:
    """Returns the class names of labels that are text: "0".."C-1" for class numbers, else the sorted labels.

    Integers that do not begin at 0 are names, in the order of their values.
    """
    names = {nfc(label) for label in labels}
    if not all(name.isascii() and name.isdigit() and len(name) < MAX_DIGITS for name in names):
        return tuple(sorted(names))
    numbers = sorted(names, key=lambda name: (int(name), name))
    highest = int(numbers[-1])
    if numbers[0] != "0" or highest >= len(labels):
        return tuple(numbers)
    return tuple(map(str, range(highest + 1)))  # a number without a sample is refused later


def _read_columns(path: Path, options: ReadOptions) -> tuple[dict[str, list[str]], list[int]]:
    """Returns the columns by their names in lower case, and the line on which each row ends."""
    lines, rows = read_rows(path, str(path), "data")
    header = [cell.strip().lower() for cell in rows[0]]
    wanted = {name.lower() for name in (options.image_column, options.label_column) if name}
    if len(header) < 2 or not (set(header) & {*IMAGES, *LABELS, *wanted}):
        raise UserError("data", path, "has no header; begin it with a line such as path,label or path,label,split")
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(header):
            raise UserError("data", path, f"line {line} has {len(row)} columns; the header has {len(header)}")
    twice = next((name for name, count in Counter(header).items() if count > 1), None)
    if twice is not None:
        raise UserError("data", path, f"has two columns named {twice!r}; remove one")
    if len(rows) == 1:
        raise UserError("data", path, "has a header and no rows")
    return {name: [row[k].strip() for row in rows[1:]] for k, name in enumerate(header)}, lines[1:]


def _column(
    columns: dict[str, list[str]], chosen: str | None, known: tuple[str, ...], path: Path, content: str, option: str
) -> str:
    if chosen is not None:
        if chosen.lower() not in columns:
            raise UserError(option, chosen, f"{path} has no such column, only {', '.join(columns)[:200]}")
        return chosen.lower()
    name = next((name for name in known if name in columns), None)
    if name is None:
        listed = ", ".join(columns)[:200]
        raise UserError("data", path, f"which column holds the {content}, {listed}? Use --set {option}=NAME")
    return name


def _require_distinct(files: list[Path], lines: list[int], path: Path) -> None:
    first: dict[Path, int] = {}
    for file, line in zip(files, lines, strict=True):
        if file in first:
            raise UserError("data", path, f"lines {first[file]} and {line} name the same image; remove one")
        first[file] = line


def _by_split(
    rows: list[LabelledFile], splits: list[str] | None, lines: list[int], path: Path
) -> dict[str, list[LabelledFile]]:
    """Returns the rows of the train and the test split."""
    if splits is None:
        return {"train": rows}
    by_split: dict[str, list[LabelledFile]] = {}
    for row, text, line in zip(rows, splits, lines, strict=True):
        split = split_of_folder(text)
        if split is None:
            raise UserError("data", path, f"line {line}: split {text!r} is unknown; write train, test or validation")
        by_split.setdefault(split, []).append(row)
    return {split: by_split[name] for split, name in choose_splits(by_split).items()}
