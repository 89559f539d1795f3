"""The command `tadperf experts`: trains experts that several runs can share."""

from __future__ import annotations

from typing import Any

from tadperf.experts import store
from tadperf.nets.students import summarise
from tadperf.pipeline.matching import get_experts
from tadperf.pipeline.trusted import load_data, trusted_samples
from tadperf.progress import Progress, silent
from tadperf.run.folder import Run
from tadperf.task.samples import training_samples
from tadperf.task.task import Task


def train_experts(task: Task, run: Run, progress: Progress = silent) -> dict[str, Any]:
    """The experts alone, for runs to share."""
    data = load_data(task, run, progress)
    samples, _ = trusted_samples(task, data, run, progress)
    seen = training_samples(data, samples)
    with run.stage("experts"):
        get_experts(task, seen, run, progress)
    accuracies = store.scores(run.path / "experts", task.config.experts.count)
    result = {
        "experts": task.config.experts.count,
        "snapshots": task.epochs + 1,
        "path": str(run.path / "experts"),
        "train_accuracy": summarise(accuracies)["mean"],
        **run.stages()["experts"],
    }
    run.finish(result)
    return result
