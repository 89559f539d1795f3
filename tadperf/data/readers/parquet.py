"""Reads parquet files in the schema of the Hugging Face hub: an image column, a label column, splits by file name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tadperf.data.layout import Layout, ReadOptions
from tadperf.data.parsing import parser_errors
from tadperf.data.readers.shards import BATCH, shards_layout
from tadperf.data.splits import split_of_file, split_of_folder
from tadperf.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


def read_parquet(path: Path, options: ReadOptions) -> Layout:
    """Reads a parquet file or a folder of them, see `shards_layout`.

    Recognises the splits by the names of files and folders. Raises UserError on a damaged file, on a missing shard, and
    if a folder holds several data sets.
    """
    files = split_files(path, ".parquet")
    return shards_layout({split: [_Parquet(file) for file in shards] for split, shards in files.items()}, path, options)


class _Parquet:
    """A parquet file as a `Shard`."""

    key = ""

    def __init__(self, file: Path) -> None:
        self.name, self.files, self.roots = str(file), [file], [file.parent]

    @property
    def schema(self) -> pa.Schema:
        return self._open().schema_arrow

    def batches(self, column: str) -> Iterator[pa.Array]:
        with parser_errors("parquet file", self.files[0]):
            for batch in self._open().iter_batches(BATCH, columns=[column]):
                yield batch.column(0)

    def _open(self) -> Any:
        import pyarrow.parquet as pq

        with parser_errors("parquet file", self.files[0]):
            return pq.ParquetFile(self.files[0])


def split_files(path: Path, suffix: str) -> dict[str, list[Path]]:
    """Returns the files of each split, in order of their names, by the names of files and folders."""
    if path.is_file():
        return {split_of_file(path.stem) or "train": [path]}
    files = [file for file in sorted(path.rglob(f"*{suffix}")) if "/." not in f"/{file.relative_to(path).as_posix()}"]
    if not files:
        raise UserError("data", path, f"holds no {suffix} file")
    return group_by_split(path, files)


def group_by_split(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Returns files in `path` by their split, from the names of files and folders. All are "train" if none names one.

    Raises UserError if some name a split and others do not, if a shard is missing, and on several data sets.
    """
    _require_one_set(path, files)
    splits: dict[str, list[Path]] = {}
    unknown = []
    for file in files:
        parts = (file.stem, *reversed(_folders(file, path)))
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
        parents = _folders(file, path)
        sets.add("/".join(part for part in parents if not _is_split(part)) or ".")
    if len(sets) > 1:
        listed = ", ".join(sorted(sets)[:20])
        raise UserError("data", path, f"holds several data sets: {listed}; name one of these folders")


def _folders(file: Path, path: Path) -> tuple[str, ...]:
    """Returns the folders between `path` and a file: none if `path` is a pattern."""
    return file.relative_to(path).parent.parts if file.is_relative_to(path) and file != path else ()


def _is_split(folder: str) -> bool:
    return split_of_folder(folder) is not None or (split_of_file(folder) is not None and "partial" in folder.lower())


def _require_all_shards(files: list[Path]) -> None:
    for file in files:
        shard = re.search(r"-of-(\d+)$", file.stem)
        if shard and len(files) < int(shard[1]):
            raise UserError("data", file, f"only {len(files)} of {int(shard[1])} shards are there; add the others")
