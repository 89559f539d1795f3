"""Opens Python objects as data: a tadperf Dataset, objects of the library `datasets`, and torchvision's style."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tadperf.data.dataset import Dataset
from tadperf.data.layout import Content, Layout, ReadOptions
from tadperf.data.readers.hub import datasets_layout, is_datasets_object
from tadperf.data.readers.items import items_layout
from tadperf.data.splits import choose_splits, split_of_folder
from tadperf.errors import UserError

FORMAT = "python"  # of a set that no path names


def object_name(data: object) -> str:
    """Returns what stands for an object where a path is expected: "python:ImageFolder"."""
    first = next(iter(_splits(data).values()), data)
    return f"{FORMAT}:{type(first).__name__}"


def object_layout(data: object, options: ReadOptions) -> Layout:
    """Returns the layout of a data set (the train split), a pair (train, test), or a mapping from names to data sets.

    The data sets are all of one kind: tadperf's Dataset, `datasets.Dataset`, or anything that `items_layout` reads.
    """
    splits, place = _splits(data), Path(object_name(data))
    if any(is_datasets_object(split) for split in splits.values()):
        return datasets_layout(splits, place, options)
    if not all(isinstance(split, Dataset) for split in splits.values()):
        return items_layout(splits, place, options)
    names = {split.class_names for split in splits.values()}
    if len(names) > 1:
        raise UserError("data", place, "train and test have other class names; use the same")

    def read(split: Dataset) -> Content:
        return Content(split.images, split.labels, split.clean_labels, split.file_names)

    return Layout(names.pop(), {name: lambda split=split: read(split) for name, split in splits.items()})


def _splits(data: object) -> dict[str, Any]:
    """Returns the data sets by the names "train" and "test"."""
    if isinstance(data, tuple) and len(data) == 2:
        return {"train": data[0]} | ({} if data[1] is None else {"test": data[1]})
    if not isinstance(data, Mapping):
        return {"train": data}
    if len(data) == 1:
        return {"train": next(iter(data.values()))}
    by_split = {split_of_folder(str(name)): name for name in data}
    chosen = choose_splits(split for split in by_split if split)
    if "train" not in chosen:
        listed = ", ".join(map(str, data))[:200]
        raise UserError("data", type(data).__name__, f"has no split named train, only {listed}")
    return {split: data[by_split[name]] for split, name in chosen.items()}
