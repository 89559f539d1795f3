"""Chooses how Triton kernels are launched on this GPU: `tadperf bench --tune` keeps it in launch.user_file()."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tadperf.bench.operators import cuda
from tadperf.bench.operators.engine import Bench, Size, mismatch
from tadperf.kernels import launch

Entry = dict[str, int]
GAIN = 0.98  # a candidate must take less than this share of the best time: smaller differences are noise
LIMITS = {"num_warps": (1, 32), "num_stages": (1, 6)}


def neighbours(entry: Entry) -> Iterator[Entry]:
    """Entries with one value changed: stages by one, powers of two halved and doubled."""
    for key, value in entry.items():
        low, high = LIMITS.get(key, (1, 2**20))
        others = (value - 1, value + 1) if key == "num_stages" else (value // 2, value * 2)
        if key == "num_stages" or value & (value - 1) == 0:
            yield from ({**entry, key: other} for other in others if low <= other <= high)


def descend(entry: Entry, cost: Callable[[Entry], float]) -> Entry:
    """The entry that none of its neighbours betters by GAIN, going on from each that does; inf is a failed launch."""
    best, least = entry, cost(entry)
    seen = [entry]
    while True:
        for candidate in neighbours(best):
            if candidate in seen:
                continue
            seen.append(candidate)
            if (found := cost(candidate)) < GAIN * least:
                best, least = candidate, found
                break
        else:
            return best


def asked(function: Callable[[], object]) -> dict[tuple[str, int], Entry]:
    """Which launches a call takes: the entry by (operator, size)."""
    found: dict[tuple[str, int], Entry] = {}

    def choose(operator: str, size: int, entry: Entry) -> Entry:
        found[operator, size] = entry
        return entry

    with launch.replaced(choose):
        function()
    return found


def tune(bench: Bench, sizes: Sequence[Size], device: torch.device) -> Iterator[tuple[str, Path]]:
    """Tunes each launch that the operator takes at these sizes, one after another; (operator, file written).

    An entry holds up to the size that it was tuned at; beyond the largest, the shipped ones hold.
    """
    function = bench.providers["tadperf"].build()
    best: dict[tuple[str, int], Entry] = {}
    for size in sizes:
        count = cuda.rotation(bench.moved(size, torch.float32), cuda.l2_bytes(device))
        sets = [bench.inputs(size, torch.float32, device, seed) for seed in range(count)]
        truth = bench.reference(*sets[0])
        for key, entry in asked(partial(function, *sets[0])).items():
            best[key] = descend(entry, partial(_cost, bench, function, sets, truth, best, key))
    for operator in {operator for operator, _ in best}:
        rows = [{"up_to": extent, **entry} for (name, extent), entry in sorted(best.items()) if name == operator]
        yield operator, launch.write(operator, torch.cuda.get_device_name(device), rows)


def _cost(
    bench: Bench,
    function: Callable[..., Any],
    sets: Sequence[tuple[Any, ...]],
    truth: Any,
    best: dict[tuple[str, int], Entry],
    key: tuple[str, int],
    candidate: Entry,
) -> float:
    """Milliseconds with this candidate for one launch and the best found for the others; inf where it fails."""

    def choose(operator: str, size: int, entry: Entry) -> Entry:
        return candidate if (operator, size) == key else best.get((operator, size), entry)

    with launch.replaced(choose):
        try:
            wrong = mismatch(truth, function(*sets[0]), bench)
            return float("inf") if wrong else float(np.median(cuda.replayed(function, sets, 5)))
        except Exception:  # more registers or shared memory than there are
            return float("inf")
