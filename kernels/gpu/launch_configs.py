"""Launch configurations of the Triton kernels, in a table by device name. No kernel is tuned inside compiled code.

`tadperf bench --tune` writes the user's file, launch_configs.json in the cache folder. It takes precedence over the
launch_configs.json beside this file:

    {device name or "default": {operator: [{"up_to": 64, "rows": 32, "num_warps": 4}, ..., {"up_to": null, ...}]}}

The first entry with `up_to` >= size is used; null means no limit. Each operator defines its size (for example the
number of classes). The default entries are not tuned on any GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

SHIPPED = Path(__file__).with_name("launch_configs.json")
_override: Callable[[str, int, dict[str, int]], dict[str, int]] | None = None


def user_file() -> Path:
    """Returns the path of the user's file: $XDG_CACHE_HOME/tadperf/launch_configs.json, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tadperf" / "launch_configs.json"


@cache
def _tables() -> list[dict]:
    files = [path for path in (user_file(), SHIPPED) if path.is_file()]
    return [json.loads(path.read_text()) for path in files]


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "default"


@cache
def lookup(operator: str, device_name: str, size: int) -> dict[str, int]:
    """Returns the entry for this size, without `up_to`: that of the device if there is one, else the default entry."""
    for name in (device_name, "default"):
        for table in _tables():
            for entry in table.get(name, {}).get(operator, []):
                if entry["up_to"] is None or size <= entry["up_to"]:
                    return {key: value for key, value in entry.items() if key != "up_to"}
    raise KeyError(f"launch_configs.json has no default for {operator} of size {size}")


def launch_config(operator: str, device: torch.device, size: int) -> dict[str, int]:
    """Returns the block sizes, num_warps and num_stages of `operator` on this device."""
    config = lookup(operator, _device_name(device), size)
    return config if _override is None else _override(operator, size, config)


@contextlib.contextmanager
def override(choose: Callable[[str, int, dict[str, int]], dict[str, int]]) -> Iterator[None]:
    """Replaces each launch configuration inside the block by choose(operator, size, config). The tuner uses it."""
    global _override
    before, _override = _override, choose
    try:
        yield
    finally:
        _override = before


def shipped(operator: str) -> list[dict[str, int]]:
    """Returns all shipped entries of an operator, each with its `up_to`. Tests compile each of them."""
    table = json.loads(SHIPPED.read_text())
    return [entry for device in table.values() for entry in device.get(operator, [])]


def save(operator: str, device_name: str, entries: Sequence[Mapping[str, int | None]]) -> Path:
    """Replaces the entries of an operator for a device in the user's file. Returns its path."""
    path = user_file()
    table = json.loads(path.read_text()) if path.is_file() else {}
    table.setdefault(device_name, {})[operator] = entries
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(table, indent=1))
    partial.replace(path)
    _tables.cache_clear()
    lookup.cache_clear()
    return path
