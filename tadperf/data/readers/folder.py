"""Reads image folders: one folder per class."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from tadperf.data.layout import Layout, ReadOptions
from tadperf.data.readers.image_files import LabelledFile, files_layout
from tadperf.data.readers.table import class_names_of
from tadperf.data.splits import choose_splits, look_like_splits, split_of_folder
from tadperf.data.text import display_name
from tadperf.data.walk import is_image, visible_folders, walk
from tadperf.errors import UserError, warn_user

MAX_DESCENT = 2  # levels with a single folder that are skipped in search of the classes
NO_IMAGE = (
    "no image found; put the images (jpg, png, tif, ...) of each class into a folder of its own, name a table of the "
    "images (.csv), or set data.label_pattern if their names hold the labels"
)
LISTED = 8  # a warning names at most this many kinds of files or folders


def read_folder(path: Path, options: ReadOptions) -> Layout:
    """Reads a folder per class, below split folders (`splits.WORDS`) or directly in `path` (then no test split).

    Classes are in the order of their names, and images in the order of their paths. Names that start with a dot are
    ignored; a warning counts other files that are not images. Raises UserError if there is no image, if a split
    is ambiguous, and if the test split has a class that train lacks.
    """
    if not path.is_dir():
        raise UserError("data", path, "is a file; an image folder is a folder with a folder per class")
    if options.label_pattern is not None:
        return _by_pattern(path, options.label_pattern, options)
    roots = _split_roots(path)
    classes = {split: _classes(root) for split, root in roots.items()}
    names = tuple(classes.get("train", classes.get("test", {})))
    for split, folders in classes.items():
        other = next((name for name in folders if name not in names), None)
        if other is not None:
            raise UserError("data", roots[split] / other, "is a class that train does not have; use the same folders")
    skipped: Counter[str] = Counter()
    files = {
        split: [
            LabelledFile(file, c) for c, name in enumerate(names) for file in _images(folders.get(name, []), skipped)
        ]
        for split, folders in classes.items()
    }
    for split, images in files.items():
        if not images:
            raise UserError("data", roots[split], NO_IMAGE)
    _report_skipped(path, skipped + _outside_of_classes(set(roots.values())))
    return files_layout(path, names, files, options)


def _by_pattern(path: Path, pattern: str, options: ReadOptions) -> Layout:
    """Reads images whose label is the first group of `pattern` in their path, below split folders or in `path`."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError("data.label_pattern", pattern, f"is no regular expression ({error})") from None
    if expression.groups < 1:
        raise UserError("data.label_pattern", pattern, "needs a group around the label, such as ^([a-z]+)")
    folders = {split: folder for folder in visible_folders(path) if (split := split_of_folder(folder.name))}
    roots = {split: folders[name] for split, name in choose_splits(folders).items()}
    roots = roots if "train" in roots else {"train": path}
    found: dict[str, list[tuple[Path, str]]] = {}
    for split, root in roots.items():
        images = sorted(file for file in walk(root) if is_image(file.name))
        if not images:
            raise UserError("data", root, "no image found; name the folder of the images")
        matches = [expression.search(display_name(file.relative_to(root).as_posix())) for file in images]
        missed = [file for file, match in zip(images, matches, strict=True) if not match or not match[1]]
        if missed:
            count = f"finds no label in {len(missed)} of {len(images)} paths"
            raise UserError("data.label_pattern", pattern, f"{count}, first {missed[0].relative_to(root)}")
        found[split] = [(file, match[1]) for file, match in zip(images, matches, strict=True) if match]
    names = class_names_of([label for files in found.values() for _, label in files])
    number = {name: c for c, name in enumerate(names)}
    splits = {split: [LabelledFile(file, number[label]) for file, label in files] for split, files in found.items()}
    return files_layout(path, names, splits, options)


def _split_roots(path: Path, descent: int = 0) -> dict[str, Path]:
    """Returns the folders that hold the class folders of "train" and "test"."""
    folders = visible_folders(path)
    splits: dict[str, list[Path]] = {}
    others = []
    for folder in folders:
        split = split_of_folder(folder.name)
        if split and _is_split_folder(folder):
            splits.setdefault(split, []).append(folder)
        else:
            others.append(folder)
    for split, candidates in splits.items():
        if len(candidates) > 1:
            listed = " and ".join(folder.name for folder in candidates)
            raise UserError("data", path, f"{listed} are both {split} splits by their names; keep or rename one")
    if splits and ("train" in splits or not others):
        chosen = choose_splits(splits)
        unused = [*others, *(splits[name][0] for name in splits if name not in chosen.values())]
        if unused:
            listed = ", ".join(sorted(folder.name for folder in unused)[:LISTED])
            warn_user(f"data: {path}: {len(unused)} folders are not used: {listed}")
        return {split: _nested(splits[name][0]) for split, name in chosen.items()}
    suspects = look_like_splits(folder.name for folder in folders)
    if suspects and all(_is_split_folder(path / name) for name in suspects):
        raise UserError("data", path, f"{', '.join(suspects)} look like splits; rename them to train and test")
    only = _only_with_images(folders) if descent < MAX_DESCENT else None
    if only is None or not visible_folders(only):
        return {"train": path}
    if len(folders) > 1:
        listed = ", ".join([folder.name for folder in folders if folder != only][:LISTED])
        warn_user(f"data: {path}: {len(folders) - 1} folders without images are not used: {listed}")
    return _split_roots(only, descent + 1)


def _only_with_images(folders: list[Path]) -> Path | None:
    """Returns the folder that has images at any depth, if there is just one: Food-101 has images/ and meta/."""
    with_images = (folder for folder in folders if any(is_image(file.name) for file in walk(folder)))
    first, second = next(with_images, None), next(with_images, None)
    return first if second is None else None


def _is_split_folder(folder: Path) -> bool:
    """Returns whether a folder can be a split: it has folders in it, or nothing. A class named "train" holds images."""
    if visible_folders(folder):
        return True
    with os.scandir(folder) as entries:
        return not any(is_image(entry.name) for entry in entries)


def _nested(folder: Path) -> Path:
    """Returns the inner folder if a split folder holds only a folder of the same split: seg_train/seg_train."""
    inside = visible_folders(folder)
    same = len(inside) == 1 and split_of_folder(inside[0].name) == split_of_folder(folder.name)
    return inside[0] if same and visible_folders(inside[0]) else folder


def _classes(root: Path) -> dict[str, list[Path]]:
    """Returns the folders of each class. Folders whose names differ only in Unicode form are one class."""
    classes: dict[str, list[Path]] = {}
    for folder in visible_folders(root):
        classes.setdefault(display_name(folder.name), []).append(folder)
    return dict(sorted(classes.items()))


def _images(folders: list[Path], skipped: Counter[str]) -> list[Path]:
    """Returns the images at any depth below the folders of a class, sorted. Counts the other files by suffix."""
    images = []
    for file in (file for folder in folders for file in walk(folder)):
        if is_image(file.name):
            images.append(file)
        else:
            skipped[file.suffix.lower() or "no suffix"] += 1
    return sorted(images)


def _outside_of_classes(roots: set[Path]) -> Counter[str]:
    names = [entry.name for root in roots for entry in root.iterdir() if is_image(entry.name) and entry.is_file()]
    return Counter({"images outside of a class folder": len(names)}) if names else Counter()


def _report_skipped(path: Path, skipped: Counter[str]) -> None:
    if skipped:
        kinds = sorted(skipped.items(), key=lambda kind: (-kind[1], kind[0]))
        listed = ", ".join(f"{kind} ({count})" for kind, count in kinds[:LISTED])
        more = f" and {len(skipped) - LISTED} other kinds" if len(skipped) > LISTED else ""
        warn_user(f"data: {path}: {skipped.total()} other files are not used: {listed}{more}")
