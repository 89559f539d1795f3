"""Opens the data of a config and checks everything that needs no computation."""

from __future__ import annotations

from tadperf.compute.device import resolve_device
from tadperf.config import Config
from tadperf.data import augment
from tadperf.data.dataset import Dataset
from tadperf.data.noise import add_noise, parse_noise
from tadperf.data.open import open_config
from tadperf.errors import UserError
from tadperf.matching.bases import check_match_config
from tadperf.progress import Progress, silent
from tadperf.refine.checks import check_refine_config
from tadperf.task.samples import check_holdout
from tadperf.task.task import Task, shared_experts_folder
from tadperf.trust.evidence import check_evidence


def prepare(config: Config, progress: Progress = silent, given: object = None) -> Task:
    """Checks a config and opens its data, or a Python object. Computes nothing, writes nothing into the run folder.

    Raises UserError if anything in the config or the data is wrong.
    """
    check_config(config)
    device = resolve_device(config.device)
    data = config.data
    train, test = open_config(data, progress, data.test_share, given)
    assert test is not None  # it is made if the data have none
    _check_images(config, train)
    check_match_config(config.match, train.num_classes)
    train = add_noise(train, data.noise, config.seed)
    if config.trust.mode == "oracle" and train.clean_labels is None:
        raise UserError("--trust", "oracle", f"needs clean labels, which {train.name} does not have; add --noise")
    check_evidence(config.trust, train)
    task = Task(config, train, test, device)
    check_holdout(task)
    if config.experts.path:
        shared_experts_folder(task)
    return task


def check_config(config: Config) -> None:
    """Checks the settings that do not depend on the data. Raises UserError if one is wrong."""
    parse_noise(config.data.noise)
    augment.parse(config.data.augment)
    if config.net.norm == "batch":
        raise UserError("net.norm", "batch", "trajectories need a network without running statistics; use instance")
    if config.net.name.endswith("bn"):
        remedy = f"trajectories need a network without running statistics; use {config.net.name.removesuffix('bn')}"
        raise UserError("net.name", config.net.name, remedy)
    if config.match.min_start > config.match.max_start:
        remedy = f"must not be above match.max_start = {config.match.max_start}"
        raise UserError("match.min_start", config.match.min_start, remedy)
    needed, epochs = config.match.max_start + config.match.expert_epochs, config.experts.epochs
    if epochs is not None and epochs < needed:
        remedy = f"must be at least match.max_start + match.expert_epochs = {needed}"
        raise UserError("experts.epochs", epochs, remedy)
    if config.synthesis != "matching":
        if config.match.factor > 1:
            remedy = f"needs synthesis=matching; with synthesis={config.synthesis} use 1"
            raise UserError("match.factor", config.match.factor, remedy)
        check_refine_config(config)


def _check_images(config: Config, train: Dataset) -> None:
    if train.num_classes < 2:
        raise UserError("data", config.data.path, "has only one class; classification needs at least two")
    _, height, width = train.shape
    if height != width:
        remedy = f"images are {height} x {width} but the networks need square ones; add --image-size"
        raise UserError("data", config.data.path, remedy)
