"""Reads Arrow files: folders that `datasets.Dataset.save_to_disk` writes, and .arrow files. Needs pyarrow alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tadperf.data.layout import Layout, ReadOptions
from tadperf.data.parsing import parser_errors
from tadperf.data.readers.parquet import split_files
from tadperf.data.readers.shards import Shard, known_splits, shards_layout
from tadperf.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS, STATE = "dataset_dict.json", "state.json"  # the files of save_to_disk for a DatasetDict and for a Dataset
MAX_BYTES = 1 << 24  # of these JSON files


def holds_arrow(path: Path) -> bool:
    """Returns whether `save_to_disk` wrote a folder."""
    return (path / SPLITS).is_file() or (path / STATE).is_file()


def read_arrow(path: Path, options: ReadOptions) -> Layout:
    """Reads an .arrow file, a folder of them, or a folder of `save_to_disk`, see `shards_layout`.

    Raises UserError on a damaged or missing file, and on a file name that leaves the folder.
    """
    if (path / SPLITS).is_file():
        names = _names(_read_json(path / SPLITS).get("splits"), path / SPLITS, "splits")
        shards = {name: _saved_split(path / name) for name in names}
        return shards_layout(known_splits(shards, path), path, options)
    if (path / STATE).is_file():
        return shards_layout({"train": _saved_split(path)}, path, options)
    files = split_files(path, ".arrow")
    return shards_layout({split: [_Arrow(file) for file in shards] for split, shards in files.items()}, path, options)


def _saved_split(folder: Path) -> Sequence[Shard]:
    """Returns the shards that a state.json lists."""
    file = folder / STATE
    if not file.is_file():
        raise UserError("data", file, "is missing; copy the folder again")
    state = _read_json(file)
    if state.get("_indices_data_files"):
        remedy = "was saved with an index of rows by an old version of datasets; save it again with a newer one"
        raise UserError("data", folder, remedy)
    listed = state.get("_data_files")
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise UserError("data", file, "is damaged: _data_files is no list of files; copy it again")
    names = _names([entry.get("filename") for entry in listed], file, "_data_files")
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise UserError("data", folder / missing, "is missing; copy the folder again")
    return [_Arrow(folder / name) for name in names]


def _read_json(file: Path) -> dict[str, Any]:
    with parser_errors("JSON file", file):
        if file.stat().st_size > MAX_BYTES:
            raise UserError("data", file, f"is larger than {MAX_BYTES >> 20} MB; use the original file")
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"a JSON {type(content).__name__}")
    return content


def _names(names: object, file: Path, key: str) -> list[str]:
    """Returns names of files in the folder of `file`. Raises UserError on any other value, such as a path."""
    if not isinstance(names, list) or not names:
        raise UserError("data", file, f"is damaged: {key} lists nothing; copy it again")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\0" in name or "\\" in name:
            raise UserError("data", file, f"{key} holds {str(name)[:80]!r}; must be the name of a file next to it")
    return names


class _Arrow:
    """An Arrow file, as a stream (of `datasets`) or with an index (of Feather), as a `Shard`."""

    key = ""

    def __init__(self, file: Path) -> None:
        self.name, self.files, self.roots = str(file), [file], [file.parent]

    @property
    def schema(self) -> pa.Schema:
        with parser_errors("Arrow file", self.files[0]), self._map() as source:
            return self._reader(source).schema

    def batches(self, column: str) -> Iterator[pa.Array]:
        import pyarrow as pa

        with parser_errors("Arrow file", self.files[0]), self._map() as source:
            reader = self._reader(source)
            if isinstance(reader, pa.RecordBatchFileReader):
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                batches = iter(reader)
            for batch in batches:
                values = batch.column(batch.schema.get_field_index(column))
                values.validate(full=True)  # a wrong offset in a hostile file would read outside of its buffers
                yield values

    def _map(self) -> pa.MemoryMappedFile:
        import pyarrow as pa

        return pa.memory_map(str(self.files[0]))

    def _reader(self, source: pa.MemoryMappedFile) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
        import pyarrow as pa

        is_indexed = source.read(6) == b"ARROW1"
        source.seek(0)
        return pa.ipc.open_file(source) if is_indexed else pa.ipc.open_stream(source)
