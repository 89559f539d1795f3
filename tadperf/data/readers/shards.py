"""Sets stored as Arrow tables: parquet files, Arrow files, and data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tadperf.data.decode import BitDepth, Encoded
from tadperf.data.decode_split import decode_split
from tadperf.data.image_paths import ImageFinder
from tadperf.data.layout import Content, Layout, ReadOptions, index_labels
from tadperf.data.readers.columns import (
    LABELS,
    hub_features,
    image_column,
    is_unlabelled,
    label_column,
    require_few_classes,
)
from tadperf.data.splits import choose_splits, split_of_folder
from tadperf.errors import UserError, warn_user

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 1024  # rows read at a time; not tuned


class Shard(Protocol):
    """A table of a split, or a part of it.

    name: for messages. files: what the images of a large set are cached under, together with `key`. roots: the folders
    that may hold the images if the table stores their paths.
    """

    @property
    def name(self) -> str: ...
    @property
    def files(self) -> Sequence[Path]: ...
    @property
    def key(self) -> str: ...
    @property
    def roots(self) -> Sequence[Path]: ...
    @property
    def schema(self) -> pa.Schema: ...

    def batches(self, column: str) -> Iterator[pa.Array]:
        """Yields the values of a column, at most BATCH rows or one stored batch at a time."""
        ...


def shards_layout(splits: Mapping[str, Sequence[Shard]], place: Path, options: ReadOptions) -> Layout:
    """Returns the layout of a set of tables: images as struct {bytes, path}, or bytes, labels as integers or names.

    splits: the shards of each split, by the names "train", "test" and "validation"; `choose_splits` chooses two.
    Takes the columns that the options name, else those in the hub's metadata, else known names, else the only one that
    fits. Raises UserError if no column or several columns fit, and if all labels are -1 (a split without labels).
    """
    schema = next(iter(splits.values()))[0].schema
    features = hub_features(schema)
    image = image_column(schema, features, place, options.image_column)
    label = label_column(schema, features, place, options.label_column)
    columns = {split: _read_column(shards, label) for split, shards in splits.items()}
    if options.label_column is None and label not in LABELS and label not in features:
        require_few_classes(columns, label, place)
    hub_names = features.get(label, {}).get("names")
    class_names = tuple(map(str, hub_names)) if isinstance(hub_names, list) and hub_names else None
    chosen = choose_splits(split for split, values in columns.items() if not is_unlabelled(values))
    if not chosen:
        raise UserError("data", place, f"every label in column {label!r} is -1; this file holds no labels")
    names, labels = index_labels({split: columns[name] for split, name in chosen.items()}, class_names, str(place))
    root = Path(options.image_root).expanduser().absolute() if options.image_root else None
    depth = BitDepth(lambda: (row for name in chosen.values() for row in _encoded(splits[name], image, root)))

    def read(split: str) -> Content:
        shards = splits[chosen[split]]
        files, key = [file for shard in shards for file in shard.files], "".join(shard.key for shard in shards)
        return decode_split(lambda: _encoded(shards, image, root), labels[split], options, files, depth, key=key)

    return Layout(names, {split: lambda split=split: read(split) for split in chosen})


def known_splits(shards: Mapping[str, Sequence[Shard]], place: Path) -> dict[str, Sequence[Shard]]:
    """Returns the shards by the names that `choose_splits` knows. One split of another name is the train split."""
    known: dict[str, Sequence[Shard]] = {}
    unknown = []
    for name, parts in shards.items():
        split = split_of_folder(name)
        if split is None:
            unknown.append(name)
        elif split in known:
            raise UserError("data", place, f"holds two {split} splits, one named {name!r}; keep or rename one")
        else:
            known[split] = parts
    if not known and len(unknown) == 1:
        return {"train": shards[unknown[0]]}
    if not known:
        raise UserError("data", place, f"which split is for training, {', '.join(unknown)[:200]}? Rename it to train")
    if unknown:
        warn_user(f"data: {place}: {len(unknown)} splits are not used: {', '.join(unknown)[:200]}")
    return known


def _read_column(shards: Sequence[Shard], column: str) -> np.ndarray:
    parts = []
    for shard in shards:
        batches = list(shard.batches(column))
        if empty := sum(values.null_count for values in batches):
            raise UserError("data", shard.name, f"{empty} rows of column {column!r} have no label; remove them")
        parts += [np.asarray(values.to_pylist()) for values in batches if len(values)]
    return np.concatenate(parts) if parts else np.empty(0)


def _encoded(shards: Sequence[Shard], column: str, root: Path | None) -> Iterator[Encoded]:
    """Yields each image as "shard row i" with its bytes or its file. Holds one batch of rows in memory."""
    import pyarrow as pa

    for shard in shards:
        row, roots = 0, [root] if root else shard.roots
        finders: dict[Path, ImageFinder] = {}
        for values in shard.batches(column):
            paths = None
            if pa.types.is_struct(values.type):
                if values.type.get_field_index("path") >= 0:
                    paths = values.field("path")
                values = values.field("bytes")
            for i, value in enumerate(values.to_pylist()):
                place = f"{shard.name} row {row}"
                path = None if paths is None else paths[i].as_py()
                if isinstance(value, bytes):
                    yield Encoded(place, value)
                elif isinstance(path, str):
                    yield Encoded(place, _finder(path, roots, finders).find(path, place))
                else:
                    raise UserError("data", place, "has no image bytes and no path; embed the image files")
                row += 1


def _finder(path: str, roots: Sequence[Path], finders: dict[Path, ImageFinder]) -> ImageFinder:
    """Returns the finder for the folder that holds a path, by default for the first folder."""
    root = next((folder for folder in roots if Path(path).is_relative_to(folder)), roots[0])
    if root not in finders:
        finders[root] = ImageFinder(root)
    return finders[root]
