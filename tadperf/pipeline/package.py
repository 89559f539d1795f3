"""Packs a synthetic set with everything that is needed to use it."""

from __future__ import annotations

from pathlib import Path

from tadperf.artifact import DistilledSet
from tadperf.compute.versions import versions
from tadperf.config import Config
from tadperf.matching.state import MatchState
from tadperf.nets.training import Recipe
from tadperf.task.samples import NormalisedData
from tadperf.task.task import Task

# The set before the first iteration, in the form of a distilled one.
INITIAL = Path("checkpoints", "initial.safetensors")
PLACES = {"experts": {"path", "workers"}, "refine": {"start"}}  # of the config: of this machine, so not in the file


def student_recipe(config: Config, lr: float) -> Recipe:
    """How students are trained: the learned learning rate unless one is set."""
    e = config.evaluate
    return Recipe(e.epochs, e.batch, e.lr or lr, e.momentum, e.weight_decay, config.data.augment)


def package_set(task: Task, data: NormalisedData, state: MatchState, lr: float | None = None) -> DistilledSet:
    """The synthetic set of a state with everything needed to use it; `lr` in place of the learned one."""
    config, lr = task.config, lr or float(state.log_lr.exp())
    return DistilledSet(
        state.average.cpu(),
        state.labels.cpu(),
        lr,
        task.train.class_names,
        data.normaliser,
        config.data.augment,
        config.net,
        student_recipe(config, lr),
        config.model_dump(mode="json", exclude=PLACES),
        config.seed,
        versions(),
        {"name": task.train.name, "source": task.train.source, "fingerprint": task.train.fingerprint},
    )
