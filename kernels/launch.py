"""How each Triton kernel is launched: data by device name, so that a compiled region never tunes anything.

launches.json, and over it the user's own launches.json in the cache folder, which `tadperf bench --tune` writes:

    {device name or "default": {operator: [{"up_to": 64, "rows": 32, "num_warps": 4}, ..., {"up_to": null, ...}]}}

The first entry whose `up_to` is at least the size (what that is, an operator says: its classes, say) holds; null is no
limit.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

SHIPPED = Path(__file__).with_name("launches.json")
_choose: Callable[[str, int, dict[str, int]], dict[str, int]] | None = None


def user_file() -> Path:
    """Where tuned launches are kept: $XDG_CACHE_HOME/tadperf/launches.json, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tadperf" / "launches.json"


@cache
def _tables() -> list[dict]:
    files = [path for path in (user_file(), SHIPPED) if path.is_file()]
    return [json.loads(path.read_text()) for path in files]


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "default"


@cache
def lookup(operator: str, device_name: str, size: int) -> dict[str, int]:
    """The entry for this size, without `up_to`, of the device's table or else of the default one."""
    for name in (device_name, "default"):
        for table in _tables():
            for entry in table.get(name, {}).get(operator, []):
                if entry["up_to"] is None or size <= entry["up_to"]:
                    return {key: value for key, value in entry.items() if key != "up_to"}
    raise KeyError(f"launches.json has no default for {operator} of size {size}")


def launch(operator: str, device: torch.device, size: int) -> dict[str, int]:
    """How to launch `operator` on this device: block sizes, num_warps, num_stages."""
    entry = lookup(operator, _device_name(device), size)
    return entry if _choose is None else _choose(operator, size, entry)


@contextlib.contextmanager
def replaced(choose: Callable[[str, int, dict[str, int]], dict[str, int]]) -> Iterator[None]:
    """Within, choose(operator, size, entry) says how to launch instead: for tuning, which tries entries this way."""
    global _choose
    before, _choose = _choose, choose
    try:
        yield
    finally:
        _choose = before


def every(operator: str) -> list[dict[str, int]]:
    """All shipped entries of an operator, each with its `up_to`; for tests that compile each of them."""
    table = json.loads(SHIPPED.read_text())
    return [entry for device in table.values() for entry in device.get(operator, [])]


def write(operator: str, device_name: str, entries: Sequence[Mapping[str, int | None]]) -> Path:
    """Replaces an operator's entries for a device in the user's file; returns its path."""
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
