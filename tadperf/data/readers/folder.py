"""Image folders: one folder per class."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tadperf.data.layout import SPLITS, Content, Layout, choose_splits
from tadperf.data.pixels import decode
from tadperf.errors import UserError
from tadperf.progress import Progress, silent

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")


def read_folder(path: Path, image_size: int | None, progress: Progress = silent) -> Layout:
    """A folder per class, under train/ and test/ (validation/, valid/, val/), or right in `path` (then no test split).

    Classes are numbered in the order of their names; what starts with a dot is passed over. Raises UserError where
    there is no image, and where the test split has a class that train has not.
    """
    if not path.is_dir():
        raise UserError("data", path, "is a file; an image folder is wanted")
    folders = {folder.name.lower(): folder for folder in _visible_folders(path)}
    chosen = choose_splits({name: folders[name] for name in SPLITS if name in folders})
    roots = {split: folders[name] for split, name in chosen.items()} or {"train": path}
    classes = {split: {folder.name: folder for folder in _visible_folders(root)} for split, root in roots.items()}
    names = tuple(classes.get("train", classes.get("test", {})))
    for split, found in classes.items():
        other = next((name for name in found if name not in names), None)
        if other is not None:
            raise UserError("data", roots[split] / other, "is a class that train does not have; use the same folders")
    files = {
        split: [(file, c) for c, name in enumerate(names) if name in found for file in _images(found[name])]
        for split, found in classes.items()
    }
    for split, found in files.items():
        if not found:
            kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
            raise UserError("data", roots[split], f"no image found; put {kinds} files in one folder per class")

    def read(split: str) -> Content:
        encoded = ((str(file), file) for file, _ in files[split])
        found = [file for file, _ in files[split]]
        images = decode(encoded, len(found), image_size, found, progress)
        return Content(images, torch.tensor([c for _, c in files[split]]))

    return Layout(names, {split: lambda split=split: read(split) for split in files})


def _visible_folders(path: Path) -> list[Path]:
    folders = (entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return sorted(folders, key=lambda folder: folder.name)


def _images(folder: Path) -> list[Path]:
    """The images at any depth below a class's folder, in order of their paths."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)
