"""What one matching iteration asks of a CUDA device, and whether it computes what a CPU computes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from counters import counters
from torch import Tensor

from tadperf.config import Config, MatchConfig, NetConfig
from tadperf.experts.store import Experts, save_expert
from tadperf.matching import loop
from tadperf.matching.loop import MatchProblem, match_trajectories
from tadperf.matching.state import initial_state
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.run.folder import Run

NET, SHAPE, STRATEGY = NetConfig(width=4, depth=1), (3, 8, 8), "color_crop_cutout_flip_scale_rotate"
SHORT, LONG = 4, 9  # iterations; the first ones record the graph
DIVERGING = {"lr_img": 1e30}


def learn(device: str, folder: Path, iterations: int, **values: Any) -> tuple[Tensor, list[dict[str, Any]]]:
    """Returns the learned images on the CPU, and the records of all iterations."""
    fields = {"steps": 3, "batch": 4, "ipc": 2, "max_start": 2, "expert_epochs": 1, "lr_init": 0.05, "lr_img": 1.0}
    config = MatchConfig.model_validate({**fields, "check_every": 100, "iterations": iterations, **values})
    generator = torch.Generator().manual_seed(0)
    images, logits = torch.randn(6, *SHAPE, generator=generator), torch.randn(6, 3, generator=generator)
    net = FlatNet(build(NET, SHAPE, 3, 0).to(device))
    experts = folder / "experts"
    if not experts.exists():
        experts.mkdir()
        for index in range(2):
            steps = torch.randn(4, net.num_parameters, generator=generator).cumsum(0) * 0.02
            save_expert(experts, index, net.flatten().cpu() + steps)
    problem = MatchProblem(net, Experts.open(experts, 2), config, STRATEGY, 0)
    with Run.create(Path(tempfile.mkdtemp(dir=folder)) / "run", Config(match=config)) as run:
        (run.path / "checkpoints").mkdir()
        state = initial_state(images.to(device), logits.to(device), config)
        counters.reset()
        best = match_trajectories(state, problem, lambda *_: 0.5, run)
        records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return best.images.cpu(), records


def iterations(folder: Path, **values: Any) -> dict[str, Any]:
    """Returns the counts of LONG - SHORT iterations, and the error of images and losses."""
    counts = []
    for number in (SHORT, LONG):
        images, records = learn("cuda", folder, number, **values)
        counts.append(dict(counters.counts))
    exact, expected = learn("cpu", folder, LONG, **values, compile="off")
    losses, truth = ([record["loss"] for record in values if "loss" in record] for values in (records, expected))
    return {
        "counts": {kind: counts[1][kind] - counts[0].get(kind, 0) for kind in counts[1]},
        "images": float((images - exact).norm() / exact.norm()),
        "losses": max(abs(a - b) / b for a, b in zip(losses, truth, strict=True)),
        "layers": [record.get("layers") for record in records],
    }


def late_and_at_once(folder: Path) -> dict[str, Any]:
    """Runs a job that diverges again and again, and reads each iteration late, then at once."""
    results = []
    for devices in (("cuda",), ()):
        loop.WORKS_AHEAD = devices
        results.append(learn("cuda", folder, LONG, **DIVERGING))
    (images, late), (other, at_once) = results
    return {
        "undone": sum(record.get("undone", False) for record in late),
        "same": torch.equal(images, other) and late == at_once,
    }


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        learn("cuda", Path(folder), SHORT)  # copies the tables of a Triton kernel to the device, once in a process
        names = {"one trajectory": 1, "three trajectories": 3}
        found = {name: iterations(Path(folder), trajectories=number) for name, number in names.items()}
        return found | {"diverging": late_and_at_once(Path(folder))}
