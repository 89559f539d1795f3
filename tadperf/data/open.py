"""One function that opens any labelled image set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, overload

from tadperf.data.dataset import Dataset
from tadperf.data.labels import replace_labels, require_every_class
from tadperf.data.layout import Layout
from tadperf.data.pixels import resize
from tadperf.data.readers.arrays import read_npz, read_safetensors
from tadperf.data.readers.cifar import holds_cifar, read_cifar
from tadperf.data.readers.digits import read_digits
from tadperf.data.readers.folder import read_folder
from tadperf.data.readers.idx import holds_idx, read_idx
from tadperf.data.readers.parquet import read_parquet
from tadperf.errors import UserError
from tadperf.progress import Progress, silent


class Splits(NamedTuple):
    """Train and test split; test is None where the set has none."""

    train: Dataset
    test: Dataset | None


class TestOnly(NamedTuple):
    """What `open_data(need_train=False)` gives: the train split is not read."""

    __test__ = False  # no test case, whatever pytest makes of the name

    train: None
    test: Dataset | None


@overload
def open_data(
    path: str | Path = "digits",
    *,
    format: str | None = None,
    image_size: int | None = None,
    labels: str | None = None,
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
    need_train: bool,
    progress: Progress = silent,
) -> Splits | TestOnly: ...
def open_data(
    path: str | Path = "digits",
    *,
    format: str | None = None,
    image_size: int | None = None,
    labels: str | None = None,
    need_train: bool = True,
    progress: Progress = silent,
) -> Splits | TestOnly:
    """Opens `digits` (built in), parquet, an image folder, CIFAR pickles, .npz, .safetensors or MNIST's idx.gz.

    path: "digits", or a file or folder; its format is detected unless `format` names it.
    image_size: resizes every image to a square of this side (shorter side, centre crop).
    labels: a file of labels for the train split, see `replace_labels`.
    need_train: where False the train split is not read, and `train` is None.
    Images that take more than a quarter of the machine's memory are memory-mapped, from a file in the user's cache
    folder that is made once (`mapped`) where their own is no such thing.
    Raises UserError, before any work is lost, on whatever is wrong with the path or its content.
    """
    if image_size is not None and image_size < 1:
        raise UserError("--image-size", image_size, "must be at least 1")
    if format is not None and format not in READERS:
        raise UserError("--format", format, f"is unknown; known are {', '.join(READERS)}")
    place = Path(path).expanduser()
    kind = format or ("digits" if str(path) == "digits" else _detect(place))
    if kind != "digits":
        place = _existing(place)
    layout = READERS[kind](place, image_size, progress)
    origin = {"path": "digits" if kind == "digits" else str(place), "format": kind, "image_size": image_size}

    def read(split: str) -> Dataset | None:
        if split not in layout.splits:
            return None
        images, given, clean = layout.splits[split]()
        source = {**origin, "split": split, "labels": None}
        if image_size is not None:
            images = resize(images, image_size, [place] if place.exists() else [], progress)
        return Dataset(images, given, layout.class_names, place.stem or place.name, clean, source)

    if not need_train:
        return TestOnly(None, read("test"))
    train = read("train")
    if train is None:
        raise UserError("data", path, "has no train split, only test; name a file or folder that holds both")
    if labels is not None:
        train = replace_labels(train, labels)
    require_every_class(train, "data", path)
    return _agree(train, read("test"))


def _agree(train: Dataset, test: Dataset | None) -> Splits:
    """Both splits in one shape: greyscale follows the other to colour; a second size raises UserError."""
    if test is not None and train.shape != test.shape:
        train, test = (_colour(train), _colour(test))
        if train.shape != test.shape:
            sizes = " and ".join(f"{split.shape[1]} x {split.shape[2]}" for split in (train, test))
            raise UserError("data", train.source["path"], f"train and test images of {sizes}; give --image-size")
    return Splits(train, test)


def _colour(split: Dataset) -> Dataset:
    return replace(split, images=split.images.expand(-1, 3, -1, -1).contiguous())


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError("data", path, "no such file or folder; name one, or 'digits' for the built-in set")
    return path.absolute()


def _detect(path: Path) -> str:
    """The format of an existing path, from its name, or from what a folder holds."""
    if _existing(path).is_file():
        name, endings = path.name.lower(), {".parquet": "parquet", ".npz": "npz", ".safetensors": "safetensors"}
        endings |= {".tar.gz": "cifar", ".tgz": "cifar", ".tar": "cifar"}
        found = next((kind for ending, kind in endings.items() if name.endswith(ending)), None)
        if found is None:
            raise UserError("data", path, f"is of no known format; name one by --format: {', '.join(READERS)}")
        return found
    if holds_cifar(path):
        return "cifar"
    if holds_idx(path):
        return "idx"
    return "parquet" if next(path.rglob("*.parquet"), None) else "folder"


READERS: dict[str, Callable[[Path, int | None, Progress], Layout]] = {
    "digits": read_digits,
    "parquet": read_parquet,
    "folder": read_folder,
    "cifar": read_cifar,
    "npz": read_npz,
    "safetensors": read_safetensors,
    "idx": read_idx,
}
