"""Chooses the columns of images and labels in an Arrow schema, as parquet files and the Hugging Face hub have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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


def hub_features(schema: pa.Schema) -> dict[str, Any]:
    """Returns the hub's features by column; {} if the file has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def image_column(schema: pa.Schema, features: dict[str, Any], path: Path, chosen: str | None) -> str:
    """Returns the name of the column of images: `chosen`, or the one that its type or its name tells.

    features: as the metadata of Hugging Face describe the columns; {} if there are none. Raises UserError if no column
    fits, or several do.
    """
    if chosen is not None:
        return _chosen_column(schema, path, "data.image_column", chosen, _holds_images, "encoded images (bytes)")
    typed = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    fitting = [name for name in typed or schema.names if _holds_images(schema.field(name).type)]
    if not fitting:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError("data", path, f"has no column of encoded images (bytes), only {columns[:200]}")
    return _first_known(fitting, IMAGES, path, "images", "data.image_column")


def label_column(schema: pa.Schema, features: dict[str, Any], path: Path, chosen: str | None) -> str:
    """Returns the name of the column of labels, chosen as by `image_column`. Columns of ids are none."""
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


def require_few_classes(columns: dict[str, np.ndarray], label: str, path: Path) -> None:
    """Raises UserError if a guessed label column has more than half as many distinct values as rows."""
    values = np.concatenate(list(columns.values()))
    if len(np.unique(values)) * 2 > len(values):
        remedy = f"column {label!r} has too many different values for labels; use --set data.label_column=NAME"
        raise UserError("data", path, remedy)


def is_unlabelled(values: np.ndarray) -> bool:
    """Returns whether every label is -1, as in the hub's test splits with secret labels."""
    return values.dtype.kind == "i" and bool((values == -1).all())
