"""Parquet files in the Hugging Face hub's schema: an image column, a label column, splits by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tadperf.data.layout import Content, Layout, choose_splits, index_labels, split_of
from tadperf.data.pixels import decode
from tadperf.errors import UserError
from tadperf.progress import Progress, silent

if TYPE_CHECKING:
    import pyarrow as pa

LABELS = ("label", "labels", "fine_label", "fine_labels", "target", "class", "y")  # tried in this order
BATCH = 1024  # rows read at a time


def read_parquet(path: Path, image_size: int | None, progress: Progress = silent) -> Layout:
    """A parquet file, or a folder of them: images as struct {bytes, path} or bytes, labels as integers or names.

    Columns and class names come from the hub's metadata in the schema, else from the Arrow types. Splits come from the
    file's or the folder's name. Raises UserError on a damaged file, a missing shard, and where no column fits.
    """
    files = _splits(path)
    schema = _open(next(iter(files.values()))[0]).schema_arrow
    features = _features(schema)
    image, label = _image_column(schema, features, path), _label_column(schema, features, path)
    class_names = tuple(features.get(label, {}).get("names") or ()) or None
    columns = {name: _column(shards, label) for name, shards in files.items()}
    chosen = choose_splits({name: values for name, values in columns.items() if not _unlabelled(values)})
    if not chosen:
        raise UserError("data", path, f"every label in column {label!r} is -1; this file holds no labels")
    names, labels = index_labels({split: columns[name] for split, name in chosen.items()}, class_names, str(path))

    def read(split: str) -> Content:
        shards = files[chosen[split]]
        images = decode(_encoded(shards, image), len(labels[split]), image_size, shards, progress)
        return Content(images, labels[split])

    return Layout(names, {split: lambda split=split: read(split) for split in chosen})


def _splits(path: Path) -> dict[str, list[Path]]:
    """The files of each split, in order of their names."""
    if path.is_file():
        return {split_of(path.stem) or "train": [path]}
    found: dict[str, list[Path]] = {}
    files = [file for file in sorted(path.rglob("*.parquet")) if "/." not in f"/{file.relative_to(path).as_posix()}"]
    if not files:
        raise UserError("data", path, "holds no .parquet file")
    for file in files:
        parts = (file.stem, *reversed(file.relative_to(path).parent.parts))
        split = next(filter(None, map(split_of, parts)), None)
        if split:
            found.setdefault(split, []).append(file)
    for shards in found.values():
        _require_all_shards(shards)
    return found or {"train": files}


def _require_all_shards(files: list[Path]) -> None:
    for file in files:
        shard = re.search(r"-of-(\d+)$", file.stem)
        if shard and len(files) < int(shard[1]):
            raise UserError("data", file, f"only {len(files)} of {int(shard[1])} shards are there; add the others")


def _open(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError("data", file, f"not a whole parquet file ({str(error).splitlines()[0][:100]}); copy it again")


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The hub's features by column, {} where the file has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _image_column(schema: pa.Schema, features: dict[str, Any], path: Path) -> str:
    import pyarrow as pa

    def holds_images(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    named = [field.name for field in schema if features.get(field.name, {}).get("_type") == "Image"]
    fitting = named or [field.name for field in schema if holds_images(field.type)]
    if not fitting or not holds_images(schema.field(fitting[0]).type):
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError("data", path, f"has no column of encoded images (bytes), only {columns[:200]}")
    return fitting[0]


def _label_column(schema: pa.Schema, features: dict[str, Any], path: Path) -> str:
    import pyarrow as pa

    def holds_labels(kind: pa.DataType) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)

    named = [field.name for field in schema if features.get(field.name, {}).get("_type") == "ClassLabel"]
    fitting = named or [field.name for field in schema if holds_labels(field.type)]
    best = next((name for name in LABELS if name in fitting), None)
    if best is None and len(named) != 1 and len(fitting) != 1:
        columns = ", ".join(schema.names)
        raise UserError("data", path, f"which column holds the labels? Name it 'label' (columns: {columns[:200]})")
    return best or fitting[0]


def _column(files: list[Path], column: str) -> np.ndarray:
    import pyarrow as pa

    parts = []
    for file in files:
        try:
            values = _open(file).read([column]).column(column)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise _damaged(file, error) from None
        if values.null_count:
            raise UserError("data", file, f"{values.null_count} rows of column {column!r} have no label; remove them")
        parts.append(np.asarray(values.to_pylist()))
    return np.concatenate(parts)


def _unlabelled(values: np.ndarray) -> bool:
    """Whether every label is -1, as the hub has it where the labels of a test split are kept back."""
    return values.dtype.kind == "i" and bool((values == -1).all())


def _encoded(files: list[Path], column: str) -> Iterator[tuple[str, bytes]]:
    """Each image's name for messages ("file row i") and its bytes, a batch of rows in memory at a time."""
    import pyarrow as pa

    for file in files:
        row = 0
        try:
            for batch in _open(file).iter_batches(BATCH, columns=[column]):
                values = batch.column(0)
                if pa.types.is_struct(values.type):
                    values = values.field("bytes")
                for value in values.to_pylist():
                    if value is None:
                        raise UserError("data", f"{file} row {row}", "no bytes of an image; embed the files")
                    yield f"{file} row {row}", value
                    row += 1
        except (pa.ArrowException, OSError) as error:
            raise _damaged(file, error) from None
