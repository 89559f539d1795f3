"""The stage experts, and the command `tadperf experts`, which runs it alone so that several runs can share them."""

from __future__ import annotations

from typing import Any

from tadperf.compute.torch_settings import torch_settings
from tadperf.errors import UserError
from tadperf.experts.replay_buffer import buffer_files, load_buffer
from tadperf.experts.store import Experts
from tadperf.experts.train import train_experts
from tadperf.nets.problem import Problem
from tadperf.nets.students import summarise
from tadperf.pipeline.context import RunContext, open_context
from tadperf.progress import Progress, silent
from tadperf.run.folder import Run
from tadperf.task.task import Task, expert_identity, expert_shapes, shared_experts_folder


def get_experts(context: RunContext) -> Experts:
    """Opens the experts that experts.path names. Without it, trains the run's missing experts and opens all of them.

    Raises UserError if an expert diverged.
    """
    task, samples = context.task, context.samples
    config = task.config
    if config.experts.path:
        place, count = shared_experts_folder(task), config.experts.count
        if buffer_files(place):
            return load_buffer(place, count, task.epochs, expert_shapes(task))
        return Experts.open(place, count)
    folder = context.run.path / "experts"
    problem = Problem(
        samples.images,
        samples.labels,
        task.train.class_names,
        config.net,
        config.data.augment,
        config.seed,
        task.device,
        samples.weights,
    )
    train_experts(folder, problem, config.experts, task.epochs, expert_identity(task), context.progress)
    experts = Experts.open(folder, config.experts.count)
    for index in range(len(experts)):
        if not experts.snapshot(index, task.epochs).isfinite().all():
            remedy = f"expert {index} diverged; delete {folder}, and start again with a smaller value"
            raise UserError("experts.lr", config.experts.lr, remedy)
    return experts


def train_shared_experts(task: Task, run: Run, progress: Progress = silent) -> dict[str, Any]:
    """Trains experts that other runs use through experts.path, and nothing else. Returns the result."""
    with torch_settings(tf32=task.config.tf32, benchmark=task.device.type == "cuda"):
        context = open_context(task, run, progress)
        with run.stage("experts"):
            get_experts(context)
    count = task.config.experts.count
    result = {
        "experts": count,
        "snapshots": task.epochs + 1,
        "path": str(run.path / "experts"),
        "train_accuracy": summarise(Experts.open(run.path / "experts", count).train_accuracies())["mean"],
        **run.stages()["experts"],
    }
    run.finish(result)
    return result
