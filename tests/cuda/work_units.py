"""Measures what one unit of work asks of a CUDA device: a training step, a step of a proxy, an iteration of matching.

Prints JSON: for each unit of budgets.py its counts, and the lines of tadperf that made them. Each count is the
difference of a longer and a shorter run, per unit, so the start of a run and the recording of its graphs do not count.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from counters import RECORD, counters

from tadperf.config import MatchConfig, NetConfig, TrustConfig
from tadperf.config.merge import merge
from tadperf.experts import store
from tadperf.experts.store import Experts
from tadperf.matching.loop import MatchProblem, match_trajectories
from tadperf.matching.state import initial_state
from tadperf.nets import training
from tadperf.nets.architectures import build
from tadperf.nets.device_batches import STEPS_PER_GRAPH
from tadperf.nets.flat import FlatNet
from tadperf.nets.problem import Problem
from tadperf.nets.training import Recipe
from tadperf.progress import silent
from tadperf.run.folder import Run
from tadperf.trust.proxies import train_proxies
from tadperf.trust.state import as_given

DEVICE = torch.device("cuda", 0)
NET = NetConfig.model_validate({"width": 4, "depth": 3})  # the depth of the presets for CIFAR
AUGMENT, SHAPE, CLASSES, COUNT, BATCH = "color_crop_cutout_flip_scale_rotate", (3, 8, 8), 4, 24, 6
IMAGES = torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(COUNT) % CLASSES
STEPS_PER_EPOCH = COUNT // BATCH


def fit(labels: torch.Tensor, rho: float = 0.0, precision: torch.dtype = torch.float32) -> Callable[[int], None]:
    def run(epochs: int) -> None:
        module = build(NET, SHAPE, CLASSES, 0).to(DEVICE)
        recipe = Recipe(epochs, BATCH, 0.01, 0.9, 5e-4, AUGMENT, decay=False, rho=rho, alpha=0.3)
        training.fit(module, IMAGES.to(DEVICE), labels, recipe, 0, precision=precision)

    return run


def proxies(epochs: int) -> None:
    names = tuple(map(str, range(CLASSES)))
    problem = Problem(IMAGES.to(DEVICE), LABELS, names, NET, AUGMENT, 0, DEVICE)
    config = TrustConfig.model_validate({"proxies": 1, "epochs": epochs, "batch": BATCH})
    train_proxies(problem, as_given(LABELS, names).view(), config, silent)


def matching(folder: Path, steps: int, precision: str = "float32") -> Callable[[int], None]:
    net = FlatNet(build(NET, SHAPE, CLASSES, 0).to(DEVICE))
    snapshots = torch.stack([build_flat(seed) for seed in range(4)])
    store.save_expert(folder, 0, snapshots)

    def run(iterations: int) -> None:
        fields = {"iterations": iterations, "check_every": 10**6, "steps": steps, "batch": BATCH, "max_start": 1}
        config = MatchConfig.model_validate({"expert_epochs": 1, "precision": precision, **fields})
        state = initial_state(IMAGES.to(DEVICE), torch.eye(CLASSES)[LABELS].to(DEVICE), config)
        problem = MatchProblem(net, Experts.open(folder, 1), config, AUGMENT, 0)
        place = Path(tempfile.mkdtemp(dir=folder)) / "run"
        with Run.create(place, merge("digits")) as opened:
            (place / "checkpoints").mkdir()
            match_trajectories(state, problem, lambda *_: 0.5, opened)

    return run


def build_flat(seed: int) -> torch.Tensor:
    return FlatNet(build(NET, SHAPE, CLASSES, seed)).flatten().clone()


def measure(run: Callable[[int], None], short: int, long: int, units: int) -> dict[str, Any]:
    """Returns the counts of `run(long)` minus those of `run(short)` for each of `units` units, and their lines."""
    found = []
    run(short)  # fills the caches of the process
    for length in (short, long):
        counters.reset()
        run(length)
        found.append((dict(counters.counts), {kind: dict(lines) for kind, lines in counters.lines.items()}))
    (counts, lines), (more, more_lines) = found
    assert more.get(RECORD) == counts.get(RECORD), "a graph is recorded in the longer run alone"
    return {
        "counts": {kind: (number - counts.get(kind, 0)) / units for kind, number in more.items()},
        "lines": {kind: _differences(more_lines[kind], lines.get(kind, {}), units) for kind in more_lines},
        "nodes": max((graph.nodes for graph in counters.graphs), default=0),
        "node_lines": max(counters.graph_lines, key=lambda launches: sum(launches.values()), default={}),
    }


def _differences(longer: dict[str, int], shorter: dict[str, int], units: int) -> dict[str, float]:
    differences = {line: (number - shorter.get(line, 0)) / units for line, number in longer.items()}
    return {line: number for line, number in differences.items() if number}


def all_units(folder: Path) -> dict[str, Any]:
    logits = torch.eye(CLASSES)[LABELS]
    # Epochs of 2 and 3 graphs. The first graph warms up, the second is recorded, and all but the first are replayed.
    short, long = (graphs * STEPS_PER_GRAPH // STEPS_PER_EPOCH for graphs in (2, 3))
    units = {
        "expert step": measure(fit(LABELS), short, long, STEPS_PER_GRAPH),
        "flat expert step": measure(fit(LABELS, rho=0.1), short, long, STEPS_PER_GRAPH),
        "student step": measure(fit(logits), short, long, STEPS_PER_GRAPH),
        "proxy step": measure(proxies, 4, 8, 4 * STEPS_PER_EPOCH),  # the outputs of the last 4 epochs are averaged
        "matching iteration": measure(matching(folder, steps=3), 4, 8, 4),
    }
    for unit in ("expert step", "flat expert step", "student step"):
        units[unit]["nodes"] /= STEPS_PER_GRAPH
    units["proxy step"]["nodes"] /= STEPS_PER_EPOCH
    three_steps = units["matching iteration"]["nodes"]
    counters.reset()
    matching(folder, steps=4)(2)
    units["matching iteration"]["nodes"] = max(graph.nodes for graph in counters.graphs) - three_steps
    return units


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(all_units(Path(folder))))
