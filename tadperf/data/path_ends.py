"""Finds files by the end of their path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath


def ends_of_paths(file_names: Sequence[str], length: int, with_suffix: bool) -> dict[str, list[int]]:
    """Returns the positions of the files by the last `length` parts of their paths, with or without suffix."""
    table: dict[str, list[int]] = {}
    for i, name in enumerate(file_names):
        path = PurePosixPath(name)
        parts = (path if with_suffix else path.with_suffix("")).parts
        if len(parts) >= length:
            table.setdefault("/".join(parts[-length:]), []).append(i)
    return table
