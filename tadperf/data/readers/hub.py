"""Loads data sets of the Hugging Face hub, and reads objects of the library `datasets`. Needs the extra `hub`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tadperf.data.layout import Layout, ReadOptions
from tadperf.data.readers.shards import BATCH, Shard, known_splits, shards_layout
from tadperf.errors import UserError
from tadperf.progress import silent

if TYPE_CHECKING:
    import pyarrow as pa

PREFIX = re.compile(r"hf:/{1,2}(datasets/)?")  # a Path turns "//" into "/"
NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # user/name, with the name of a config after a colon
EXTRA = "pip install 'tadperf[hub]'"


def hub_name(path: str | Path) -> str | None:
    """Returns "user/name" or "user/name:config" if `path` names a data set of the hub: with hf://, or a plain id.

    A plain id must not be a local path, nor a path into a local folder.
    """
    text = str(path)
    if PREFIX.match(text):
        return PREFIX.sub("", text, count=1)
    local = Path(text).expanduser()
    is_local = local.is_absolute() or local.exists() or (len(local.parts) > 1 and Path(local.parts[0]).exists())
    return text if NAME.fullmatch(text) and not is_local else None


def read_hub(path: Path, options: ReadOptions) -> Layout:
    """Loads `user/name` or `user/name:config` from the hub, or a local folder, by `datasets.load_dataset`.

    Raises UserError if `datasets` is missing, if there is no such data set, and if the hub cannot be reached.
    """
    name, _, config = str(path).partition(":")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        remedy = f"no such file or folder; to load a data set of this name from the Hugging Face hub: {EXTRA}"
        raise UserError("data", path, remedy) from None
    try:
        with _progress_bars(datasets, options.progress is not silent):
            loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # the errors of many libraries
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "onfig name" in reason:
            remedy = f"has several configs; name one as hf://{name}:CONFIG ({reason})"
        else:
            remedy = f"cannot be loaded ({reason}); check the name and the network, or download it and give its folder"
        raise UserError("data", f"hf://{name}", remedy) from None
    return datasets_layout(loaded, path, options, [path] if path.is_dir() else _caches(datasets))


def is_datasets_object(value: object) -> bool:
    """Returns whether a value is a Dataset or a dict of them, of the library `datasets`."""
    return type(value).__module__.partition(".")[0] == "datasets"


def datasets_layout(loaded: Any, place: Path, options: ReadOptions, roots: Sequence[Path] = (Path("/"),)) -> Layout:
    """Returns the layout of a `datasets.Dataset` (the train split), or of a mapping from splits to such objects.

    roots: the folders that may hold the images if the rows store their paths.
    """
    splits = dict(loaded) if hasattr(loaded, "keys") else {"train": loaded}
    for split in splits.values():
        if not hasattr(split, "select_columns") or not hasattr(split, "__len__") or split.features is None:
            kind = type(split).__name__
            raise UserError("data", place, f"holds a {kind}; load it without streaming, as a datasets.Dataset")
    shards: dict[str, Sequence[Shard]] = {
        name: [_Rows(split, f"{place} {name}", roots)] for name, split in splits.items()
    }
    known = {"train": next(iter(shards.values()))} if len(shards) == 1 else known_splits(shards, place)
    return shards_layout(known, place, options)


class _Rows:
    """A `datasets.Dataset` as a `Shard`."""

    def __init__(self, rows: Any, name: str, roots: Sequence[Path]) -> None:
        self.name, self.roots, self._rows = name, roots, rows
        self.files = [Path(file["filename"]) for file in rows.cache_files]
        self.key = str(getattr(rows, "_fingerprint", ""))  # of its content; two objects can share their files

    @property
    def schema(self) -> pa.Schema:
        return self._rows.features.arrow_schema

    def batches(self, column: str) -> Iterator[pa.Array]:
        for batch in self._rows.select_columns([column]).with_format("arrow").iter(BATCH):
            yield batch.column(0).combine_chunks()


def _caches(datasets: Any) -> list[Path]:
    """Returns the folders in which `datasets` keeps downloaded files."""
    from huggingface_hub import constants

    config = datasets.config
    places = (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    return [Path(place).expanduser().absolute() for place in places if Path(place).is_dir()] or [Path.cwd()]


@contextlib.contextmanager
def _progress_bars(datasets: Any, visible: bool) -> Iterator[None]:
    """Hides the progress bars of `datasets` in the block unless they should be visible."""
    if visible or datasets.utils.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
