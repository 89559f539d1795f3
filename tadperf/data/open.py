"""Opens any labelled image set."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tadperf.config.options import python_names
from tadperf.data.dataset import Dataset
from tadperf.data.labels import replace_labels, require_every_class
from tadperf.data.layout import Layout, ReadOptions
from tadperf.data.objects import FORMAT, object_layout, object_name
from tadperf.data.pixels import resize
from tadperf.data.readers.arrays import read_npz, read_safetensors
from tadperf.data.readers.arrow import holds_arrow, read_arrow
from tadperf.data.readers.cifar import holds_cifar, read_cifar
from tadperf.data.readers.digits import read_digits
from tadperf.data.readers.folder import read_folder
from tadperf.data.readers.hub import hub_name, read_hub
from tadperf.data.readers.idx import holds_idx, read_idx
from tadperf.data.readers.parquet import read_parquet
from tadperf.data.readers.table import read_image_table
from tadperf.data.readers.tiny_imagenet import holds_tiny_imagenet, read_tiny_imagenet
from tadperf.data.readers.webdataset import holds_shards, is_pattern, is_shard, read_webdataset
from tadperf.data.test_split import split_off_test
from tadperf.data.text import display_name
from tadperf.errors import UserError, warn_user
from tadperf.progress import Progress, silent

if TYPE_CHECKING:
    from tadperf.config.schema import DataConfig

ENDINGS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".tar.gz": "cifar",
    ".tgz": "cifar",
    ".tar": "cifar",
    ".csv": "table",
    ".tsv": "table",
}
ARCHIVES = (".zip", ".7z", ".rar", ".gz", ".xz", ".bz2", ".zst")


DEFAULTS = ReadOptions()


class Splits(NamedTuple):
    """The train and the test split; test is None if the set has none."""

    train: Dataset
    test: Dataset | None


@python_names(keywords=True)
def open_data(
    path: str | Path | object = "digits",
    *,
    format: str | None = None,
    image_size: int | None = None,
    labels: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    label_pattern: str | None = None,
    image_root: str | None = None,
    test_share: float | None = None,
    skip_broken: bool = False,
    progress: Progress = silent,
) -> Splits:
    """Opens `digits` (built in), parquet, an image folder, a table of images, CIFAR pickles, .npz, .safetensors or idx.

    path: "digits", a file or folder, or a data set of the Hugging Face hub ("hf://user/name"). Or a Python object: a
    `datasets.Dataset`, or anything with `len()` whose items are (image, label), as torchvision's data sets; a pair
    (train, test) or a dict of these gives both splits.
    format: a key of READERS; by default it is detected.
    image_size: resizes every image, shorter side to this size, then centre crop.
    labels: a file of labels for the train split, see `replace_labels`.
    image_column, label_column: columns of a table or parquet file; by default they are detected.
    label_pattern: for a folder without class folders, a regular expression that finds the label in a file's path; its
    first group is the label.
    image_root: the folder that holds the images of a table; by default the folder of the table.
    test_share: if the set has no test split, this share of each class becomes one; by default none is made.
    skip_broken: leaves out images that cannot be decoded, and lists them in Dataset.broken.
    Images that take more than a quarter of the machine's memory are memory-mapped from a file in the user's cache
    folder (`mapped`), unless their own file can be mapped.
    Raises UserError if anything is wrong with the path or its content.
    """
    options = ReadOptions(
        format,
        image_size,
        labels,
        image_column,
        label_column,
        label_pattern,
        image_root,
        test_share,
        skip_broken,
        progress,
    )
    return _open_splits(path, options)


def open_config(
    data: DataConfig, progress: Progress = silent, test_share: float | None = None, given: object = None
) -> Splits:
    """Opens the set that a config names, or a Python object instead. test_share: as for `open_data`."""
    options = ReadOptions(
        format=data.format,
        image_size=data.image_size,
        labels=data.labels,
        image_column=data.image_column,
        label_column=data.label_column,
        label_pattern=data.label_pattern,
        image_root=data.image_root,
        test_share=test_share,
        skip_broken=data.skip_broken,
        progress=progress,
    )
    return _open_splits(data.path if given is None else given, options)


def open_test_split(path: str | Path, options: ReadOptions = DEFAULTS) -> Dataset | None:
    """Opens the test split alone, without reading the train split. Returns None if the set has none.

    A test split that `open_data` makes needs the train split, so then both are read.
    """
    source = _find(path, options)
    if "test" not in source.layout.splits and options.test_share:
        return _open_splits(path, options).test
    return _read_split(source, "test", options)


class _Source(NamedTuple):
    layout: Layout
    format: str
    place: Path


def _find(path: str | Path | object, options: ReadOptions) -> _Source:
    """Finds the data and reads what can be read without decoding images."""
    if options.image_size is not None and options.image_size < 1:
        raise UserError("--image-size", options.image_size, "must be at least 1")
    if options.format is not None and options.format not in READERS:
        raise UserError("--format", options.format, f"unknown format; choose one of {', '.join(READERS)}")
    if not isinstance(path, (str, Path)):
        return _Source(object_layout(path, options), FORMAT, Path(object_name(path)))
    is_digits = options.format == "digits" or str(path) == "digits"
    kind, place = ("digits", Path("digits")) if is_digits else _locate(path, options.format)
    if options.label_pattern is not None and kind != "folder":
        raise UserError("data.label_pattern", options.label_pattern, f"is for folders of images; {place} is {kind}")
    with _reading(place):
        return _Source(READERS[kind](place, options), kind, place)


def _open_splits(path: str | Path | object, options: ReadOptions) -> Splits:
    source = _find(path, options)
    train = _read_split(source, "train", options)
    if train is None:
        raise UserError("data", source.place, "has no train split, only test; name a file or folder that holds both")
    _require_classes(train, source.place)
    labels, test = options.labels, None
    if "test" not in source.layout.splits and options.test_share:
        train, test = split_off_test(train, options.test_share, labels)
    elif labels is not None:
        train = replace_labels(train, labels)
    require_every_class(train, *("data", source.place) if labels is None else ("--labels", labels))
    return _same_shape(train, test or _read_split(source, "test", options))


def _read_split(source: _Source, split: str, options: ReadOptions) -> Dataset | None:
    """Reads a split. Returns None if the set does not have it."""
    layout, kind, place = source
    if split not in layout.splits:
        return None
    with _reading(place):
        content = layout.splits[split]()
        files = [place] if place.exists() else []
        images = resize(content.images, options.image_size, files, options.progress)
    if content.broken:
        count = f"{len(content.broken)} of {len(images) + len(content.broken)} images"
        warn_user(f"data: {place}: {count} of the {split} split cannot be decoded and are left out")
    name = display_name(place.stem or place.name)
    return Dataset(
        images,
        content.labels,
        layout.class_names,
        name,
        content.clean_labels,
        {**options.values(), "path": str(place), "format": kind, "split": split, "labels": None},
        content.file_names,
        content.broken,
    )


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
    if (name := hub_name(path)) is not None and kind in (None, "hub"):
        return "hub", Path(name)
    if re.match("[a-z0-9+]+://", str(path)):
        remedy = "is a URL, and tadperf opens files; download the data and name their folder"
        raise UserError("data", path, f"{remedy}, or name a hub data set such as ylecun/mnist")
    path = Path(path).expanduser()
    if not path.exists() and is_pattern(path) and kind in (None, "webdataset"):
        return "webdataset", path.absolute()
    if not path.exists():
        raise UserError("data", path, "no such file or folder; name one, or 'digits' for the built-in set")
    path = path.absolute()
    if kind:
        return kind, path
    if path.is_file():
        known = next((kind for ending, kind in ENDINGS.items() if path.name.lower().endswith(ending)), None)
        if known is None and path.name.lower().endswith(ARCHIVES):
            raise UserError("data", path, "is an archive; unpack it, and name the folder")
        if known is None:
            raise UserError("data", path, f"unknown format; choose one with --format: {', '.join(READERS)}")
        return "webdataset" if known == "cifar" and is_shard(path) else known, path
    sets = _known_sets([path]) or _known_sets([*path.glob("*/"), *path.glob("*/raw/")])
    if len(sets) > 1:
        listed = ", ".join(str(place.relative_to(path)) for _, place in sets)
        raise UserError("data", path, f"holds several data sets: {listed}; name one of these folders")
    if sets:
        return sets[0]
    if next(path.rglob("*.parquet"), None):
        return "parquet", path
    if next(itertools.chain(path.glob("*.arrow"), path.glob("*/*.arrow")), None):
        return "arrow", path
    return "webdataset" if holds_shards(path) else "folder", path


def _known_sets(folders: list[Path]) -> list[tuple[str, Path]]:
    """Returns the folders that hold CIFAR's or MNIST's files."""
    kinds = {"cifar": holds_cifar, "idx": holds_idx, "arrow": holds_arrow, "tiny-imagenet": holds_tiny_imagenet}
    return [(kind, folder) for folder in sorted(folders) for kind, holds in kinds.items() if holds(folder)]


READERS: dict[str, Callable[[Path, ReadOptions], Layout]] = {
    "digits": read_digits,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "hub": read_hub,
    "folder": read_folder,
    "table": read_image_table,
    "webdataset": read_webdataset,
    "tiny-imagenet": read_tiny_imagenet,
    "cifar": read_cifar,
    "npz": read_npz,
    "safetensors": read_safetensors,
    "idx": read_idx,
}
