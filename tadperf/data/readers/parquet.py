"""Reads parquet files in the schema of the Hugging Face hub: an image column, a label column, splits by file name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tadperf.data.decode import BitDepth, Encoded
from tadperf.data.decode_split import decode_split
from tadperf.data.layout import Content, Layout, ReadOptions, index_labels
from tadperf.data.parsing import parser_errors
from tadperf.data.splits import choose_splits, split_of_file, split_of_folder
from tadperf.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# Known column names, the first match wins.
IMAGES = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "bytes")
LABELS = (
    "label",
    "labels",
    "fine_label",
    "fine_labels",
    "target",
    "targets",
    "class",
    "classes",
    "y",
    "category",
    "class_id",
    "class_label",
    "category_id",
    "label_id",
    "cls",
)
IDS = ("id", "ids", "index", "idx", "image_id", "width", "height", "__index_level_0__")  # numbers, but not labels
BATCH = 1024  # rows read at a time; not tuned


def read_parquet(path: Path, options: ReadOptions) -> Layout:
    """Reads a parquet file or a folder of them: images as struct {bytes, path} or bytes, labels as integers or names.

    Takes the columns that the options name, else those in the hub's metadata, else known names, else the only one that
    fits. Recognises the splits by the names of files and folders. Raises UserError on a damaged file, on a missing
    shard, if no column or several columns fit, and if a folder holds several data sets.
    """
    files = _split_files(path)
    schema = _open(next(iter(files.values()))[0]).schema_arrow
    features = _features(schema)
    image = _image_column(schema, features, path, options.image_column)
    label = _label_column(schema, features, path, options.label_column)
    columns = {split: _read_column(shards, label) for split, shards in files.items()}
    if options.label_column is None and label not in LABELS and label not in features:
        _require_few_classes(columns, label, path)
    hub_names = features.get(label, {}).get("names")
    class_names = tuple(map(str, hub_names)) if isinstance(hub_names, list) and hub_names else None
    chosen = choose_splits(split for split, values in columns.items() if not _is_unlabelled(values))
    if not chosen:
        raise UserError("data", path, f"every label in column {label!r} is -1; this file holds no labels")
    names, labels = index_labels({split: columns[name] for split, name in chosen.items()}, class_names, str(path))
    depth = BitDepth(lambda: (row for name in chosen.values() for row in _encoded(files[name], image)))

    def read(split: str) -> Content:
        shards = files[chosen[split]]
        return decode_split(lambda: _encoded(shards, image), labels[split], options, shards, depth)

    return Layout(names, {split: lambda split=split: read(split) for split in chosen})


def _split_files(path: Path) -> dict[str, list[Path]]:
    """Returns the files of each split, in order of their names."""
    if path.is_file():
        return {split_of_file(path.stem) or "train": [path]}
    files = [file for file in sorted(path.rglob("*.parquet")) if "/." not in f"/{file.relative_to(path).as_posix()}"]
    if not files:
        raise UserError("data", path, "holds no .parquet file")
    _require_one_set(path, files)
    splits: dict[str, list[Path]] = {}
    unknown = []
    for file in files:
        parts = (file.stem, *reversed(file.relative_to(path).parent.parts))
        split = next(filter(None, map(split_of_file, parts)), None)
        if split:
            splits.setdefault(split, []).append(file)
        else:
            unknown.append(file)
    if splits and unknown:
        remedy = "names no split, but other files do; name it train or test, or move it away"
        raise UserError("data", unknown[0], remedy)
    for shards in splits.values():
        _require_all_shards(shards)
    return splits or {"train": files}


def _require_one_set(path: Path, files: list[Path]) -> None:
    """Raises UserError if files lie in several folders that are not splits: a hub repository of several configs."""
    sets = set()
    for file in files:
        parents = file.relative_to(path).parent.parts
        sets.add("/".join(part for part in parents if not _is_split(part)) or ".")
    if len(sets) > 1:
        listed = ", ".join(sorted(sets)[:20])
        raise UserError("data", path, f"holds several data sets: {listed}; name one of these folders")


def _is_split(folder: str) -> bool:
    return split_of_folder(folder) is not None or (split_of_file(folder) is not None and "partial" in folder.lower())


def _require_all_shards(files: list[Path]) -> None:
    for file in files:
        shard = re.search(r"-of-(\d+)$", file.stem)
        if shard and len(files) < int(shard[1]):
            raise UserError("data", file, f"only {len(files)} of {int(shard[1])} shards are there; add the others")


def _open(file: Path) -> Any:
    import pyarrow.parquet as pq

    with parser_errors("parquet file", file):
        return pq.ParquetFile(file)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Returns the hub's features by column; {} if the file has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _image_column(schema: pa.Schema, features: dict[str, Any], path: Path, chosen: str | None) -> str:
    if chosen is not None:
        return _chosen_column(schema, path, "data.image_column", chosen, _holds_images, "encoded images (bytes)")
    typed = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    fitting = [name for name in typed or schema.names if _holds_images(schema.field(name).type)]
    if not fitting:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError("data", path, f"has no column of encoded images (bytes), only {columns[:200]}")
    return _first_known(fitting, IMAGES, path, "images", "data.image_column")


def _label_column(schema: pa.Schema, features: dict[str, Any], path: Path, chosen: str | None) -> str:
    if chosen is not None:
        return _chosen_column(schema, path, "data.label_column", chosen, _holds_labels, "integers or class names")
    typed = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    known = next((name for name in LABELS if name in (typed or schema.names)), None)
    if known is not None and not _holds_labels(schema.field(known).type):
        kind = schema.field(known).type
        remedy = f"column {known!r} holds {kind}; labels must be integers or class names: convert it"
        raise UserError("data", path, remedy)
    fitting = [name for name in typed or schema.names if name not in IDS and _holds_labels(schema.field(name).type)]
    if not fitting:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError("data", path, f"has no column of labels, only {columns[:200]}; set data.label_column")
    return known or _first_known(fitting, LABELS, path, "labels", "data.label_column")


def _chosen_column(schema: pa.Schema, path: Path, field: str, name: str, fits: Any, content: str) -> str:
    if name not in schema.names:
        raise UserError(field, name, f"{path} has no such column, only {', '.join(schema.names)[:200]}")
    if not fits(schema.field(name).type):
        raise UserError(field, name, f"holds {schema.field(name).type}; must hold {content}")
    return name


def _first_known(fitting: list[str], known: tuple[str, ...], path: Path, content: str, option: str) -> str:
    """Returns the column with a known name, or the only one. Raises UserError if there are several."""
    best = next((name for name in known if name in fitting), None)
    if best is None and len(fitting) > 1:
        remedy = f"which column holds the {content}, {' or '.join(fitting)[:200]}? Use --set {option}=NAME"
        raise UserError("data", path, remedy)
    return best or fitting[0]


def _holds_images(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_labels(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _read_column(files: list[Path], column: str) -> np.ndarray:
    parts = []
    for file in files:
        with parser_errors("parquet file", file):
            values = _open(file).read([column]).column(column)
            if values.null_count:
                remedy = f"{values.null_count} rows of column {column!r} have no label; remove them"
                raise UserError("data", file, remedy)
            parts.append(np.asarray(values.to_pylist()))
    return np.concatenate(parts)


def _require_few_classes(columns: dict[str, np.ndarray], label: str, path: Path) -> None:
    """Raises UserError if a guessed label column has more than half as many distinct values as rows."""
    values = np.concatenate(list(columns.values()))
    if len(np.unique(values)) * 2 > len(values):
        remedy = f"column {label!r} has too many different values for labels; use --set data.label_column=NAME"
        raise UserError("data", path, remedy)


def _is_unlabelled(values: np.ndarray) -> bool:
    """Returns whether every label is -1, as in the hub's test splits with secret labels."""
    return values.dtype.kind == "i" and bool((values == -1).all())


def _encoded(files: list[Path], column: str) -> Iterator[Encoded]:
    """Yields each image as "file row i" with its bytes. Holds one batch of rows in memory."""
    import pyarrow as pa

    for file in files:
        row = 0
        with parser_errors("parquet file", file):
            for batch in _open(file).iter_batches(BATCH, columns=[column]):
                values = batch.column(0)
                if pa.types.is_struct(values.type):
                    values = values.field("bytes")
                for value in values.to_pylist():
                    if not isinstance(value, bytes):
                        raise UserError("data", f"{file} row {row}", "has no image bytes; embed the image files")
                    yield Encoded(f"{file} row {row}", value)
                    row += 1
