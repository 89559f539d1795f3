"""Predicts the milliseconds of units of work on an H100: python tests/cuda/run_twin.py tests/cuda/predict.py

The sizes are those of CIFAR-10 with the ConvNet of the presets (depth 3, width 128). Counts are exact; times follow
from the assumptions in costs.py, and no GPU has confirmed them. Prints JSON. Takes some minutes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import costs
import torch
import work_units
from counters import TO_DEVICE, TO_HOST, WAIT, counters

from tadperf.config import NetConfig
from tadperf.matching import loop
from tadperf.nets.device_batches import STEPS_PER_GRAPH

IMAGES = {"expert": 1024, "proxy": 256, "matching": 100, "student": 100}
BATCHES = {"expert": 256, "proxy": 64, "matching": 100, "student": 100}
STEPS = 30  # of matching
PROXY_STEPS = 4 * 12 * 586  # of a trust round: 50 000 images, 4 proxies with a held-out fold each, 12 epochs


def use(unit: str) -> int:
    """Gives work_units the sizes of a unit; returns the steps of an epoch."""
    count = IMAGES[unit]
    work_units.NET = NetConfig.model_validate({"width": 128, "depth": 3})
    work_units.SHAPE, work_units.CLASSES, work_units.COUNT, work_units.BATCH = (3, 32, 32), 10, count, BATCHES[unit]
    work_units.IMAGES = torch.randn(count, *work_units.SHAPE, generator=torch.Generator().manual_seed(0))
    work_units.LABELS = torch.arange(count) % work_units.CLASSES
    return count // BATCHES[unit]


def measure(run: Callable[[int], None], short: int, long: int, units: int, fill: bool = True) -> dict[str, float]:
    """Returns the costs of `run(long)` minus those of `run(short)`, for each of `units` units.

    fill: first fills the caches of the process.
    """
    if fill:
        run(short)
    unit, blocking = costs.Costs(), 0.0
    for length, sign in ((short, -1), (long, 1)):
        counters.reset()
        costs.total.__init__()
        run(length)
        unit.add(costs.total, sign / units)
        stops = sum(counters.counts[kind] for kind in (TO_DEVICE, TO_HOST, WAIT))
        blocking += sign * stops / units
    return vars(unit) | {"blocking": blocking, "ms": unit.ms + blocking * costs.BLOCKING_MS}


def scaled(steps: dict[int, dict[str, float]], number: int) -> dict[str, float]:
    """Returns the costs of an iteration of `number` inner steps, from those of two smaller numbers."""
    (few, first), (more, second) = sorted(steps.items())
    share = (number - few) / (more - few)
    return {name: value + share * (second[name] - value) for name, value in first.items()}


def all_units(folder: Path) -> dict[str, Any]:
    units: dict[str, Any] = {}
    for unit, labels in (("expert", False), ("student", True)):
        steps = use(unit)
        targets = torch.eye(10)[work_units.LABELS] if labels else work_units.LABELS
        # Epochs of 2 and 3 graphs. The first one warms up, the second one is recorded.
        short, long = (graphs * STEPS_PER_GRAPH // steps for graphs in (2, 3))
        for precision in (torch.float32, torch.bfloat16)[: 1 if labels else 2]:
            run = work_units.fit(targets, precision=precision)
            units[f"{unit} step, {str(precision)[6:]}"] = measure(run, short, long, STEPS_PER_GRAPH, False)
            print(list(units.items())[-1], file=sys.stderr, flush=True)
    steps = use("proxy")
    units["proxy step, float32"] = measure(work_units.proxies, 6, 8, 2 * steps, False)
    use("matching")
    loop.SAVE_EVERY = float("inf")  # this CPU takes so long that a checkpoint would fall into the longer runs alone
    for precision in ("float32", "bfloat16"):
        name, found = f"matching iteration, T = 30, {precision}", {}
        for number in (2, 3):
            place = folder / f"{precision}-{number}"
            place.mkdir()
            run = work_units.matching(place, number, precision)
            run(1)  # copies the tables of a Triton kernel to the device, once in a process
            found[number] = measure(run, 4, 5, 1, False)
        units[name] = scaled(found, STEPS)
        print(name, units[name], file=sys.stderr, flush=True)
    return units


if __name__ == "__main__":
    torch.set_num_threads(2)
    costs.counting = True
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(all_units(Path(folder)), indent=1))
