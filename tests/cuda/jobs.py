"""Small whole jobs for a CUDA device and for the CPU.

python tests/cuda/run_twin.py tests/cuda/jobs.py cuda <folder> <job>...     runs them on the twin, each in its folder
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tadperf.config import Config
from tadperf.config.merge import merge
from tadperf.files import write_json
from tadperf.kernels.dispatch import call_counts
from tadperf.nets import device_batches
from tadperf.pipeline.audit import audit_data
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.evaluate import evaluate_file
from tadperf.pipeline.prepare import prepare
from tadperf.pipeline.sweep import parse_axes, run_sweep, sweep_cells
from tadperf.refine import start
from tadperf.run.folder import Run

# Large batches: few steps leave a rounding error few chances to change the sign of a pixel before its ReLU, which would
# change a gradient by 1e-4. One more step of each kind than a graph needs: warm-up, record, replay.
SMALL = (
    "net.width=8", "net.depth=1", "experts.count=2", "experts.epochs=2", "experts.batch=512", "match.iterations=4",
    "match.check_every=2", "match.steps=2", "match.max_start=1", "match.expert_epochs=1", "evaluate.epochs=3",
    "evaluate.repeats=1", "evaluate.full_epochs=1", "evaluate.full_repeats=1", "evaluate.batch=512", "trust.rounds=1",
    "trust.proxies=2", "trust.epochs=2", "trust.batch=256", "trust.graph=false",
    "detector.batch=512",
)  # fmt: skip
REFINEMENT = (
    "match.ipc=2",
    "diffusion.width=8",
    "diffusion.iterations=3",
    "diffusion.batch=16",
    "detector.epochs=4",
    "detector.width=16",
    "detector.depth=1",
    "refine.rounds=1",
    "refine.candidates=3",
    "refine.steps=4",
    "refine.batch=16",
    "refine.top_k=2",
    "refine.soft_labels=true",
)


def config_of(device: str, *fields: str) -> Config:
    return merge("digits", None, [*SMALL, *fields], {"device": device, "data.noise": "asymmetric:0.2"})


def distill(folder: Path, config: Config) -> None:
    task = prepare(config)
    with Run.create(folder, config) as run:
        distill_task(task, run)


def matching(folder: Path, device: str) -> None:
    """Soft labels; 20 images in batches of 7, so the last batch of each pass is a smaller one. Then its evaluation."""
    fields = ("match.ipc=2", "match.batch=7", "match.steps=3", "match.soft_labels=true")
    distill(folder, config_of(device, *fields))
    write_json(folder / "evaluation.json", evaluate_file(folder / "distilled.safetensors", device=device)["accuracy"])


def ftd(folder: Path, device: str) -> None:
    """Experts in flat minima, two trajectories an iteration, averaged images, whitened data."""
    fields = ("match.method=ftd", "experts.rho=0.01", "experts.alpha=0.3", "match.trajectories=2", "match.ema=0.9")
    distill(folder, config_of(device, *fields, "data.normalise=zca", "trust.mode=off"))


def tgdd(folder: Path, device: str) -> None:
    """Feature matching with soft labels, two draws an iteration, small images, and a batch that leaves images out."""
    fields = ("match.method=tgdd", "match.ipc=2", "match.batch=10", "match.trajectories=2", "match.soft_labels=true")
    distill(folder, config_of(device, *fields, "match.lr_img=1", "match.factor=2", "trust.mode=off"))


def sweep(folder: Path, device: str) -> None:
    """Two runs, of which the second one takes the experts of the first one."""
    axes = parse_axes(["match.ipc=1,2"])
    run_sweep(sweep_cells(axes, lambda fields: config_of(device, "trust.mode=off", *fields)), folder)


def generative(folder: Path, device: str) -> None:
    """Generated images, and then a refinement of them."""
    folder.mkdir()
    distill(folder / "first", config_of(device, *REFINEMENT, "synthesis=generative", "refine.backend=eager"))
    again = merge(None, None, ["refine.beta=0.99", "refine.backend=auto"], {}, base=start.config_of(folder / "first"))
    distill(folder / "again", again)


def audit(folder: Path, device: str) -> None:
    folder.mkdir()
    audit_data(config_of(device, "trust.graph=true"))[1].save(folder / "trust.safetensors")


JOBS: dict[str, Callable[[Path, str], None]] = {
    "matching": matching,
    "ftd": ftd,
    "tgdd": tgdd,
    "sweep": sweep,
    "generative": generative,
    "audit": audit,
}


def run(job: str, folder: Path, device: str) -> dict[str, Any]:
    """Runs a job.

    Returns the counts, the recorded graphs, what CUDA would refuse, whether a compiler is loaded, and the calls of
    operators that launch Triton kernels.
    """
    from counters import counters

    counters.reset()
    before = call_counts()
    device_batches.STEPS_PER_GRAPH = 1  # so that a training of three steps replays a graph
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "CUDA graph failed")  # the run would go on without a graph
        JOBS[job](folder / job, device)
    return {
        "counts": dict(counters.counts),
        "graphs": list(counters.graphs),
        "problems": list(counters.problems),
        "compiler": "torch._dynamo" in sys.modules,
        "kernels": {operator: n for (operator, form), n in (call_counts() - before).items() if form == "triton"},
    }


if __name__ == "__main__":
    device, folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps({job: run(job, Path(folder), device) for job in names}))
