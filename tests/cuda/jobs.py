"""Small whole jobs for a CUDA device and for the CPU.

python tests/cuda/run_twin.py tests/cuda/jobs.py <folder> <job>...     runs them on the twin, each in its own folder
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tadperf.config.merge import merge
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.prepare import prepare
from tadperf.run.folder import Run

SMALL = (
    "net.width=8", "net.depth=1", "experts.count=2", "experts.epochs=2", "match.iterations=4", "match.check_every=2",
    "match.steps=2", "match.max_start=1", "match.expert_epochs=1", "evaluate.epochs=3", "evaluate.repeats=1",
    "evaluate.full_epochs=1", "evaluate.full_repeats=1", "trust.rounds=1", "trust.proxies=2", "trust.epochs=2",
)  # fmt: skip


def distill(folder: Path, device: str, preset: str, *fields: str) -> None:
    task = prepare(merge(preset, None, [*SMALL, *fields], {"device": device, "data.noise": "asymmetric:0.4"}))
    with Run.create(folder, task.config) as run:
        distill_task(task, run)


def matching(folder: Path, device: str) -> None:
    """Soft labels; 20 images in batches of 7, so the last batch of each pass is a smaller one."""
    distill(folder, device, "digits", "match.ipc=2", "match.batch=7", "match.steps=3", "match.soft_labels=true")


JOBS: dict[str, Callable[[Path, str], None]] = {"matching": matching}


def run_on_twin(folder: Path, job: str) -> dict[str, Any]:
    """Runs a job, and returns the counts, the recorded graphs, and what CUDA would refuse."""
    from counters import counters

    counters.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "CUDA graph failed")  # the run would go on without a graph
        JOBS[job](folder / job, "cuda")
    return {"counts": counters.counts, "graphs": counters.graphs, "problems": counters.problems}


if __name__ == "__main__":
    print(json.dumps({job: run_on_twin(Path(sys.argv[1]), job) for job in sys.argv[2:]}))
