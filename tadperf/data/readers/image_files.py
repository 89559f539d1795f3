"""Sets of image files: the readers that find the files share the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from tadperf.data.decode import BitDepth, Encoded
from tadperf.data.decode_split import decode_split
from tadperf.data.image_formats import SUFFIXES
from tadperf.data.layout import Content, Layout, ReadOptions
from tadperf.data.text import display_name


class LabelledFile(NamedTuple):
    """An image file, its class number, and its true class number if that is known."""

    path: Path
    label: int
    clean_label: int | None = None


def files_layout(
    root: Path, class_names: tuple[str, ...], splits: Mapping[str, list[LabelledFile]], options: ReadOptions
) -> Layout:
    """Returns the layout of a set of image files. The names of the images are their paths relative to `root`."""
    depth = BitDepth(lambda: (_encoded(file.path) for files in splits.values() for file in files))

    def read(split: str) -> Content:
        files = splits[split]
        paths = [file.path for file in files]
        names = tuple(display_name(path.relative_to(root).as_posix()) for path in paths)
        labels = torch.tensor([file.label for file in files])
        clean = [file.clean_label for file in files if file.clean_label is not None]
        clean_labels = torch.tensor(clean) if len(clean) == len(files) else None
        images = lambda: map(_encoded, paths)  # noqa: E731
        return decode_split(images, labels, options, paths, depth, names, clean_labels)

    return Layout(class_names, {split: lambda split=split: read(split) for split in splits})


def visible_folders(path: Path) -> list[Path]:
    """Returns the folders in a folder, in the order of their names, without hidden ones."""
    with os.scandir(path) as entries:
        return [path / name for name in sorted(e.name for e in entries if is_visible(e.name) and _is_folder(e))]


def is_visible(name: str) -> bool:
    """Returns whether a file or folder is not hidden."""
    return not name.startswith(".") and name != "__MACOSX"


def is_image(name: str) -> bool:
    """Returns whether a file has the name of an image."""
    return name.lower().endswith(SUFFIXES) and is_visible(name)


def walk(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Yields the visible files below a folder. Follows symbolic links, except to a folder above."""
    status = folder.stat()
    place = (status.st_dev, status.st_ino)
    if place in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_visible(entry.name):
                continue
            if _is_folder(entry):
                yield from walk(folder / entry.name, (*above, place))
            else:
                yield folder / entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _encoded(file: Path) -> Encoded:
    return Encoded(str(file), file)
