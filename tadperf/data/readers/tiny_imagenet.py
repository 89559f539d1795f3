"""Reads Tiny ImageNet as it is published: train/<id>/images, val/images with val_annotations.txt, words.txt."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tadperf.data.layout import Layout, ReadOptions
from tadperf.data.parsing import parser_errors
from tadperf.data.readers.image_files import LabelledFile, files_layout
from tadperf.data.walk import is_image, visible_folders, walk
from tadperf.errors import UserError

ANNOTATIONS, WORDS = "val_annotations.txt", "words.txt"
MAX_BYTES = 1 << 26  # of a text file; the original words.txt has 2.6 MB


def holds_tiny_imagenet(path: Path) -> bool:
    """Returns whether a folder has Tiny ImageNet's own layout."""
    val = path / "val"
    return (val / ANNOTATIONS).is_file() and (val / "images").is_dir() and (path / "train").is_dir()


def read_tiny_imagenet(path: Path, options: ReadOptions) -> Layout:
    """Reads the train split, and val as the test split: the published test images have no labels.

    Classes are in the order of their WordNet ids. Their names come from words.txt if it is there: the first word of
    each id, with the id added if two classes have the same word. Raises UserError on an annotation without an image, an
    image without an annotation, and an unknown id.
    """
    ids = [folder.name for folder in visible_folders(path / "train")]
    number = {name: c for c, name in enumerate(ids)}
    train = [
        LabelledFile(file, label)
        for name, label in number.items()
        for file in sorted(walk(path / "train" / name))
        if is_image(file.name)
    ]
    if not train:
        raise UserError("data", path / "train", "holds no image; copy the data set again")
    splits = {"train": train, "test": _validation(path / "val", number)}
    return files_layout(path, _class_names(path, ids), splits, options)


def _validation(val: Path, number: dict[str, int]) -> list[LabelledFile]:
    """Returns the images of val in the order of their names."""
    images = {file.name: file for file in walk(val / "images") if is_image(file.name)}
    labels: dict[str, int] = {}
    for line, cells in _lines(val / ANNOTATIONS):
        place = f"{val / ANNOTATIONS}: line {line}"
        if len(cells) < 2 or cells[0] not in images:
            remedy = f"is no image in {val / 'images'}; copy the data set again"
            raise UserError("data", place, f"{cells[0][:80]!r} {remedy}")
        if cells[1] not in number:
            raise UserError("data", place, f"{cells[1][:80]!r} is no folder of train; copy the data set again")
        labels[cells[0]] = number[cells[1]]
    missing = next((name for name in sorted(images) if name not in labels), None)
    if missing is not None:
        raise UserError("data", images[missing], f"has no line in {ANNOTATIONS}; copy the data set again")
    return [LabelledFile(images[name], labels[name]) for name in sorted(images)]


def _class_names(path: Path, ids: list[str]) -> tuple[str, ...]:
    words = {}
    if (path / WORDS).is_file():
        words = {cells[0]: cells[1].split(",")[0].strip() for _, cells in _lines(path / WORDS) if len(cells) > 1}
    names = [words.get(name) or name for name in ids]
    count = Counter(names)
    return tuple(name if count[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, ids, strict=True))


def _lines(file: Path) -> list[tuple[int, list[str]]]:
    """Returns the number and the cells of each line that is not empty. Tabs divide the cells."""
    if file.stat().st_size > MAX_BYTES:
        raise UserError("data", file, f"is larger than {MAX_BYTES >> 20} MB; use the original file")
    with parser_errors("text file in UTF-8", file):
        lines = file.read_text(encoding="utf-8").splitlines()
    return [(k, line.split("\t")) for k, line in enumerate(lines, 1) if line.strip()]
