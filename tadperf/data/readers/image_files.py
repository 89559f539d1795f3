"""Sets of image files: the readers that find the files share the rest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from tadperf.data.decode import BitDepth, Encoded
from tadperf.data.decode_split import decode_split
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


def _encoded(file: Path) -> Encoded:
    return Encoded(str(file), file)
