"""Packs a synthetic set with everything that its users need."""

from __future__ import annotations

from pathlib import Path

from tadperf import artifact
from tadperf.artifact import DistilledSet
from tadperf.compute.versions import versions
from tadperf.config import Config
from tadperf.data.enlarge import enlarge
from tadperf.data.normalise import Normaliser
from tadperf.errors import UserError
from tadperf.matching.state import MatchState
from tadperf.nets.training import Recipe
from tadperf.task.task import Task

DISTILLED = "distilled.safetensors"
INITIAL = Path("checkpoints", "initial.safetensors")  # the set before the first iteration, also as a DistilledSet
MACHINE_FIELDS = {"experts": {"path", "workers"}, "refine": {"start"}}  # they differ by machine, so the file omits them


def student_recipe(config: Config, lr: float) -> Recipe:
    """Returns the recipe of students. Its learning rate is evaluate.lr, or `lr` if that is not set."""
    evaluate = config.evaluate
    return Recipe(
        evaluate.epochs,
        evaluate.batch,
        evaluate.lr or lr,
        evaluate.momentum,
        evaluate.weight_decay,
        config.data.augment,
        optimizer=evaluate.optimizer,
    )


def package_set(task: Task, normaliser: Normaliser, state: MatchState, lr: float | None = None) -> DistilledSet:
    """Packs the averaged images and the labels of a state. `lr` replaces the learned learning rate."""
    config, lr = task.config, lr or float(state.log_lr.exp())
    stored, side = state.average.cpu(), task.train.shape[1]
    return DistilledSet(
        enlarge(stored, side),
        state.labels.cpu(),
        lr,
        task.train.class_names,
        normaliser,
        config.data.augment,
        config.net,
        student_recipe(config, lr),
        config.model_dump(mode="json", exclude=MACHINE_FIELDS),
        config.seed,
        versions(),
        {"name": task.train.name, "source": task.train.source, "fingerprint": task.train.fingerprint},
        None if stored.shape[-1] == side else stored,
    )


def load_stored_set(file: Path) -> DistilledSet:
    """Loads a set that the run has saved. Raises UserError if the file is damaged."""
    try:
        return artifact.load(file)
    except UserError:
        remedy = "is damaged; delete it, then use --resume to make it again from the run's checkpoint"
        raise UserError("--resume", file, remedy) from None
