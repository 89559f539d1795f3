"""Rows of figures as a table of text, as a JSON file that says where they come from, and under which name."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tadperf.bench.operators.engine import Row
from tadperf.compute.device import describe_device
from tadperf.errors import UserError
from tadperf.kernels import implementations, native

PACKAGES = ("tadperf", "torch", "triton", "numpy", "scikit-learn", "scipy", "cleanlab")
COLUMNS = {
    "shape": "{}",
    "dtype": "{}",
    "provider": "{}",
    "median_ms": "{:.4g}",
    "q20_ms": "{:.4g}",
    "q80_ms": "{:.4g}",
    "gb_s": "{:.4g}",
    "share_of_copy": "{:.0%}",
    "launches": "{}",
    "wall_ms": "{:.4g}",
    "peak_mb": "{:.4g}",
    "over_eager": "{:.2f}",
    "over_inductor": "{:.2f}",
}


def facts(operator: str, device: torch.device, threads: int, command: str) -> dict[str, Any]:
    """Where and with what an operator's rows were measured; part of every row."""
    own = {"operator": operator, "implementation": implementations()[operator][device.type]}
    return own | where(device, threads, command)


def where(device: torch.device, threads: int, command: str) -> dict[str, Any]:
    """The machine, the versions, the day and the command."""
    installed = {package: _version(package) for package in PACKAGES}
    return {
        "device": describe_device(device),
        "threads": threads,
        "isa": native.isa() if device.type == "cpu" else None,
        "versions": {"python": platform.python_version(), **{name: one for name, one in installed.items() if one}},
        "date": date.today().isoformat(),
        "command": command,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def title(facts: Mapping[str, Any]) -> str:
    """What the rows are about, in one line."""
    how = f"{facts['implementation']}, {facts['isa']}" if facts["isa"] else facts["implementation"]
    count = facts["threads"]
    threads = f", {count} thread" + "s" * (count > 1) if facts["isa"] else ""
    return f"{facts['operator']} ({how}) on {facts['device']}{threads}, torch {facts['versions']['torch']}"


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows of one operator as aligned text."""
    failed = [f"{row['shape']} {row['dtype']} {row['provider']}: {row['error']}" for row in rows if row.get("error")]
    return table(rows, COLUMNS) + failed


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> list[str]:
    """The rows as aligned text, each column in its own format; a column that no row has is left out."""
    keys = [key for key in columns if any(row.get(key) is not None for row in rows)]
    cells = [["-" if row.get(key) is None else columns[key].format(row[key]) for key in keys] for row in rows]
    cells.insert(0, [key.replace("_", " ") for key in keys])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def slug(name: str) -> str:
    """A device's name as that of a file: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def output_file(field: str, path: Path, device: torch.device, suffix: str) -> Path:
    """The file meant by `path`: itself, or in a folder the one called after the device. Raises UserError where neither.

    A file need not be there yet, its folder must.
    """
    file = path / f"{slug(describe_device(device))}{suffix}" if path.is_dir() else path
    if not file.parent.is_dir():
        raise UserError(field, path, f"there is no folder {file.parent}")
    if file.suffix != suffix:
        raise UserError(field, path, f"must be a folder or a file that ends in {suffix}")
    return file


def save(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows as JSON."""
    path.write_text(json.dumps({"rows": list(rows)}, indent=1, allow_nan=False) + "\n")
