"""Opens any labelled image set."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, overload

from tadperf.data.dataset import Dataset
from tadperf.data.labels import replace_labels, require_every_class
from tadperf.data.layout import Layout, ReadOptions
from tadperf.data.pixels import resize
from tadperf.data.readers.arrays import read_npz, read_safetensors
from tadperf.data.readers.cifar import holds_cifar, read_cifar
from tadperf.data.readers.digits import read_digits
from tadperf.data.readers.folder import read_folder
from tadperf.data.readers.idx import holds_idx, read_idx
from tadperf.data.readers.parquet import read_parquet
from tadperf.data.text import display_name
from tadperf.errors import UserError
from tadperf.progress import Progress, silent

ENDINGS = {
    ".parquet": "parquet",
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".tar.gz": "cifar",
    ".tgz": "cifar",
    ".tar": "cifar",
}


class Splits(NamedTuple):
    """The train and the test split; test is None if the set has none."""

    train: Dataset
    test: Dataset | None


class TestOnly(NamedTuple):
    """The result of `open_data(need_train=False)`: the train split is not read."""

    __test__ = False  # not a test case for pytest

    train: None
    test: Dataset | None


@overload
def open_data(
    path: str | Path = "digits",
    *,
    format: str | None = None,
    image_size: int | None = None,
    labels: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    need_train: Literal[True] = True,
    progress: Progress = silent,
) -> Splits: ...
@overload
def open_data(
    path: str | Path = "digits",
    *,
    format: str | None = None,
    image_size: int | None = None,
    labels: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    need_train: bool,
    progress: Progress = silent,
) -> Splits | TestOnly: ...
def open_data(
    path: str | Path = "digits",
    *,
    format: str | None = None,
    image_size: int | None = None,
    labels: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    need_train: bool = True,
    progress: Progress = silent,
) -> Splits | TestOnly:
    """Opens `digits` (built in), parquet, an image folder, CIFAR pickles, .npz, .safetensors or MNIST's idx.gz.

    path: "digits", or a file or folder.
    format: a key of READERS; by default it is detected.
    image_size: resizes every image, shorter side to this size, then centre crop.
    labels: a file of labels for the train split, see `replace_labels`.
    image_column, label_column: columns of a parquet file; by default they are detected.
    need_train: if False, the train split is not read and `train` is None.
    Images that take more than a quarter of the machine's memory are memory-mapped from a file in the user's cache
    folder (`mapped`), unless their own file can be mapped.
    Raises UserError if anything is wrong with the path or its content.
    """
    if image_size is not None and image_size < 1:
        raise UserError("--image-size", image_size, "must be at least 1")
    if format is not None and format not in READERS:
        raise UserError("--format", format, f"unknown format; choose one of {', '.join(READERS)}")
    kind, place = ("digits", Path("digits")) if format == "digits" or str(path) == "digits" else _locate(path, format)
    options = ReadOptions(image_size, image_column, label_column, progress)
    with _reading(place):
        layout = READERS[kind](place, options)
    if not need_train:
        return TestOnly(None, _read_split(layout, "test", kind, place, options))
    train = _read_split(layout, "train", kind, place, options)
    if train is None:
        raise UserError("data", path, "has no train split, only test; name a file or folder that holds both")
    _require_classes(train, place)
    if labels is not None:
        train = replace_labels(train, labels)
    require_every_class(train, *("data", path) if labels is None else ("--labels", labels))
    return _same_shape(train, _read_split(layout, "test", kind, place, options))


def _read_split(layout: Layout, split: str, kind: str, place: Path, options: ReadOptions) -> Dataset | None:
    """Reads a split. Returns None if the set does not have it."""
    if split not in layout.splits:
        return None
    with _reading(place):
        content = layout.splits[split]()
        files = [place] if place.exists() else []
        images = resize(content.images, options.image_size, files, options.progress)
    source = {"path": str(place), "format": kind, "image_size": options.image_size, "split": split, "labels": None}
    columns = {"image_column": options.image_column, "label_column": options.label_column}
    source |= {name: column for name, column in columns.items() if column is not None}
    name = display_name(place.stem or place.name)
    clean, file_names = content.clean_labels, content.file_names
    return Dataset(images, content.labels, layout.class_names, name, clean, source, file_names)


def _require_classes(train: Dataset, place: Path) -> None:
    """Raises UserError if there is only one class: trust and distillation make no sense then."""
    if train.num_classes > 1:
        return
    remedy = f"only one class, {train.class_names[0]!r}; put the images of each class into a folder of its own"
    raise UserError("data", place, remedy)


@contextlib.contextmanager
def _reading(place: Path) -> Iterator[None]:
    """Turns errors of the file system into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        file = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else place
        raise UserError("data", file, f"{error.strerror or error}; check the file and its permissions") from None


def _same_shape(train: Dataset, test: Dataset | None) -> Splits:
    """Brings both splits to one shape: a grey split becomes colour if the other is. Raises UserError on two sizes."""
    if test is not None and train.shape != test.shape:
        train, test = (_to_colour(train), _to_colour(test))
        if train.shape != test.shape:
            sizes = " and ".join(f"{split.shape[1]} x {split.shape[2]}" for split in (train, test))
            raise UserError("data", train.source["path"], f"train and test images of {sizes}; give --image-size")
    return Splits(train, test)


def _to_colour(split: Dataset) -> Dataset:
    return replace(split, images=split.images.expand(-1, 3, -1, -1).contiguous())


def _locate(path: str | Path, kind: str | None) -> tuple[str, Path]:
    """Returns the format and the place of the data. Detects the format if `kind` is None.

    A folder may hold the files of CIFAR or MNIST one or two levels down, as torchvision stores them.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError("data", path, "no such file or folder; name one, or 'digits' for the built-in set")
    path = path.absolute()
    if kind:
        return kind, path
    if path.is_file():
        known = next((kind for ending, kind in ENDINGS.items() if path.name.lower().endswith(ending)), None)
        if known is None:
            raise UserError("data", path, f"unknown format; choose one with --format: {', '.join(READERS)}")
        return known, path
    sets = _known_sets([path]) or _known_sets([*path.glob("*/"), *path.glob("*/raw/")])
    if len(sets) > 1:
        listed = ", ".join(str(place.relative_to(path)) for _, place in sets)
        raise UserError("data", path, f"holds several data sets: {listed}; name one of these folders")
    if sets:
        return sets[0]
    return ("parquet" if next(path.rglob("*.parquet"), None) else "folder"), path


def _known_sets(folders: list[Path]) -> list[tuple[str, Path]]:
    """Returns the folders that hold CIFAR's or MNIST's files."""
    kinds = {"cifar": holds_cifar, "idx": holds_idx}
    return [(kind, folder) for folder in sorted(folders) for kind, holds in kinds.items() if holds(folder)]


READERS: dict[str, Callable[[Path, ReadOptions], Layout]] = {
    "digits": read_digits,
    "parquet": read_parquet,
    "folder": read_folder,
    "cifar": read_cifar,
    "npz": read_npz,
    "safetensors": read_safetensors,
    "idx": read_idx,
}
