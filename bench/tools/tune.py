"""Tunes the launch settings of Triton kernels on this GPU. `tadperf bench --tune` saves them for later processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tadperf.bench.operators import cuda
from tadperf.bench.operators.engine import Bench, Size, mismatch
from tadperf.kernels.gpu import launch_configs

Entry = dict[str, int]
GAIN = 0.98  # a candidate must take less than this share of the best time; smaller gains are noise; not tuned
LIMITS = {"num_warps": (1, 32), "num_stages": (1, 6)}


def neighbours(entry: Entry) -> Iterator[Entry]:
    """Yields entries with one changed value: stages plus or minus one, powers of two halved or doubled."""
    for key, value in entry.items():
        low, high = LIMITS.get(key, (1, 2**20))
        others = (value - 1, value + 1) if key == "num_stages" else (value // 2, value * 2)
        if key == "num_stages" or value & (value - 1) == 0:
            yield from ({**entry, key: other} for other in others if low <= other <= high)


def descend(entry: Entry, cost: Callable[[Entry], float]) -> Entry:
    """Moves to better neighbours until none improves the cost by GAIN. Returns the last entry. A failure costs inf."""
    best, lowest = entry, cost(entry)
    tried = [entry]
    while True:
        for candidate in neighbours(best):
            if candidate in tried:
                continue
            tried.append(candidate)
            if (candidate_cost := cost(candidate)) < GAIN * lowest:
                best, lowest = candidate, candidate_cost
                break
        else:
            return best


def launch_entries(function: Callable[[], object]) -> dict[tuple[str, int], Entry]:
    """Returns the launch settings that a call uses, by (operator, size)."""
    found: dict[tuple[str, int], Entry] = {}

    def choose(operator: str, size: int, entry: Entry) -> Entry:
        found[operator, size] = entry
        return entry

    with launch_configs.override(choose):
        function()
    return found


def tune(bench: Bench, sizes: Sequence[Size], device: torch.device) -> Iterator[tuple[str, Path]]:
    """Tunes one launch of the operator after another at these sizes. Yields the operators and the files written.

    A tuned setting applies to sizes up to its own. Above the largest tuned size, the shipped settings apply.
    """
    function = bench.providers["tadperf"].build()
    best: dict[tuple[str, int], Entry] = {}
    for size in sizes:
        count = cuda.rotation(bench.moved(size, torch.float32), cuda.l2_bytes(device))
        sets = [bench.inputs(size, torch.float32, device, seed) for seed in range(count)]
        truth = bench.reference(*sets[0])
        for key, entry in launch_entries(partial(function, *sets[0])).items():
            best[key] = descend(entry, partial(_cost, bench, function, sets, truth, best, key))
    for operator in {operator for operator, _ in best}:
        rows = [{"up_to": extent, **entry} for (name, extent), entry in sorted(best.items()) if name == operator]
        yield operator, launch_configs.save(operator, torch.cuda.get_device_name(device), rows)


def _cost(
    bench: Bench,
    function: Callable[..., Any],
    sets: Sequence[tuple[Any, ...]],
    truth: Any,
    best: dict[tuple[str, int], Entry],
    key: tuple[str, int],
    candidate: Entry,
) -> float:
    """Returns milliseconds with this candidate for one launch and the best settings for the others; inf if it fails."""

    def choose(operator: str, size: int, entry: Entry) -> Entry:
        return candidate if (operator, size) == key else best.get((operator, size), entry)

    with launch_configs.override(choose):
        try:
            wrong = mismatch(truth, function(*sets[0]), bench)
            return float("inf") if wrong else float(np.median(cuda.replayed(function, sets, 5)))
        except Exception:  # for example too many registers or too much shared memory
            return float("inf")
