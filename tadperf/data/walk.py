"""Walks folders of images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tadperf.data.image_formats import SUFFIXES


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
