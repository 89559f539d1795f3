"""Prints and saves the rows of a benchmark, with the machine and the versions that they come from."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
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
NAMED = 3  # columns of a table that tell what a row is
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
    """Returns the operator's name and implementation, the machine and the versions, which every row repeats."""
    implementation = implementations()[operator][device.type]
    return {"operator": operator, "implementation": implementation} | machine_facts(device, threads, command)


def machine_facts(device: torch.device, threads: int, command: str) -> dict[str, Any]:
    """Returns the machine, the versions, the date and the command."""
    installed = {package: version for package in PACKAGES if (version := _version(package))}
    return {
        "device": describe_device(device),
        "threads": threads,
        "isa": native.isa() if device.type == "cpu" else None,
        "versions": {"python": platform.python_version(), **installed},
        "date": date.today().isoformat(),
        "command": command,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def title(facts: Mapping[str, Any]) -> str:
    """Returns one line about the operator, the machine and the version."""
    code = f"{facts['implementation']}, {facts['isa']}" if facts["isa"] else facts["implementation"]
    count = facts["threads"]
    threads = f", {count} thread" + "s" * (count > 1) if facts["isa"] else ""
    return f"{facts['operator']} ({code}) on {facts['device']}{threads}, torch {facts['versions']['torch']}"


def lines(rows: Sequence[Row]) -> list[str]:
    """Returns the rows of one operator as aligned text, and a line for each provider that failed."""
    failed = [f"{row['shape']} {row['dtype']} {row['provider']}: {row['error']}" for row in rows if row.get("error")]
    return table(rows, COLUMNS) + failed


def table(rows: Sequence[Row], columns: Mapping[str, str], width: int | None = None) -> list[str]:
    """Returns the rows as aligned text. columns: name -> format; a column without any value is left out.

    width: of a line, by default that of the terminal. Columns that do not fit are shown below, after the first NAMED.
    """
    keys = [key for key in columns if any(row.get(key) is not None for row in rows)]
    cells = [["-" if row.get(key) is None else columns[key].format(row[key]) for key in keys] for row in rows]
    cells.insert(0, [key.replace("_", " ") for key in keys])
    columns_of_text = [[cell.rjust(max(map(len, column))) for cell in column] for column in zip(*cells, strict=True)]
    named, blocks = columns_of_text[:NAMED], [[]]
    width = width or shutil.get_terminal_size().columns
    for column in columns_of_text[NAMED:]:
        if blocks[-1] and sum(len(part[0]) + 2 for part in (*named, *blocks[-1], column)) - 2 > width:
            blocks.append([])
        blocks[-1].append(column)
    return ["  ".join(line) for block in blocks for line in zip(*named, *block, strict=True)]


def slug(name: str) -> str:
    """Returns a device's name as a part of a file name: "nvidia-h200" for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def output_file(field: str, path: Path, device: torch.device, suffix: str) -> Path:
    """Returns `path`, or a file named after the device if `path` is a folder.

    Raises UserError if the folder of the file does not exist, if the file cannot be written or has another suffix.
    """
    file = path / f"{slug(describe_device(device))}{suffix}" if path.is_dir() else path
    if not file.parent.is_dir():
        raise UserError(field, path, f"there is no folder {file.parent}; make it first")
    if file.suffix != suffix:
        raise UserError(field, path, f"must be a folder or a file that ends in {suffix}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(field, path, "cannot be written; choose another place, or change its permissions")
    return file


def save(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows as JSON."""
    path.write_text(json.dumps({"rows": list(rows)}, indent=1, allow_nan=False) + "\n")
