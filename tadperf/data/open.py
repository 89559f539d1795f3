"""Opens any labelled image set."""

from __future__ import annotations

from collections.abc import Callable
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
    place = Path(path).expanduser()
    kind = format or ("digits" if str(path) == "digits" else "")
    if kind != "digits":
        kind, place = _locate(place, kind)
    options = ReadOptions(image_size, image_column, label_column, progress)
    layout = READERS[kind](place, options)
    origin = {"path": "digits" if kind == "digits" else str(place), "format": kind, "image_size": image_size}
    columns = {"image_column": image_column, "label_column": label_column}
    origin |= {name: column for name, column in columns.items() if column is not None}

    def read(split: str) -> Dataset | None:
        if split not in layout.splits:
            return None
        content = layout.splits[split]()
        images, source = content.images, {**origin, "split": split, "labels": None}
        if image_size is not None:
            images = resize(images, image_size, [place] if place.exists() else [], progress)
        name = place.stem or place.name
        clean, files = content.clean_labels, content.file_names
        return Dataset(images, content.labels, layout.class_names, name, clean, source, files)

    if not need_train:
        return TestOnly(None, read("test"))
    train = read("train")
    if train is None:
        raise UserError("data", path, "has no train split, only test; name a file or folder that holds both")
    if train.num_classes < 2:
        remedy = f"only one class, {train.class_names[0]!r}; put the images of each class into a folder of its own"
        raise UserError("data", path, _single_class_remedy(place, train) or remedy)
    if labels is not None:
        train = replace_labels(train, labels)
    require_every_class(train, "data", path)
    return _same_shape(train, read("test"))


def _single_class_remedy(place: Path, train: Dataset) -> str | None:
    """Suggests the folder one level down if it looks like the set itself."""
    folder = place / train.class_names[0]
    if train.source["format"] != "folder" or not folder.is_dir():
        return None
    inside = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    return f"only one class, {folder.name!r}; did you mean {folder / inside[0]}?" if inside else None


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


def _locate(path: Path, kind: str) -> tuple[str, Path]:
    """Returns the format and the place of the data. Detects the format if `kind` is empty.

    A folder may hold the files of CIFAR or MNIST one or two levels down, as torchvision stores them.
    """
    if not path.exists():
        raise UserError("data", path, "no such file or folder; name one, or 'digits' for the built-in set")
    path = path.absolute()
    if kind:
        return kind, path
    if path.is_file():
        found = next((kind for ending, kind in ENDINGS.items() if path.name.lower().endswith(ending)), None)
        if found is None:
            raise UserError("data", path, f"unknown format; choose one with --format: {', '.join(READERS)}")
        return found, path
    sets = _known_sets([path]) or _known_sets([*path.glob("*/"), *path.glob("*/raw/")])
    if len(sets) > 1:
        listed = ", ".join(str(place.relative_to(path)) for _, place in sets)
        raise UserError("data", path, f"holds several data sets: {listed}; name one of these folders")
    if sets:
        return sets[0]
    return ("parquet" if next(path.rglob("*.parquet"), None) else "folder"), path


def _known_sets(folders: list[Path]) -> list[tuple[str, Path]]:
    """Returns those of the folders that hold CIFAR's or MNIST's files."""
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
