"""Opens the data of a config and checks everything that can be checked before any work starts."""

from __future__ import annotations

import torch

from tadperf.compute.device import resolve_device, set_tf32
from tadperf.config import Config
from tadperf.data import augment
from tadperf.data.noise import add_noise, parse_noise
from tadperf.data.open import open_data
from tadperf.errors import UserError
from tadperf.progress import Progress, silent
from tadperf.refine.checks import check_refine_config
from tadperf.task.samples import select_samples
from tadperf.task.task import Task, shared_experts_folder


def prepare(config: Config, progress: Progress = silent) -> Task:
    """Opens the data and refuses whatever can be known to be wrong, before anything is written or computed."""
    where = _refuse_config(config)
    d = config.data
    train, test = open_data(d.path, format=d.format, image_size=d.image_size, labels=d.labels, progress=progress)
    if test is None:
        raise UserError("data", d.path, "has no test split; put one beside the training images, in test/ or so named")
    if train.num_classes < 2:
        raise UserError("data", d.path, "has one class only; there is nothing to tell apart")
    _, height, width = train.shape
    if height != width:
        raise UserError("data", d.path, f"images are {height} x {width}, networks take squares; add --image-size")
    train = add_noise(train, d.noise, config.seed)
    if config.trust.mode == "oracle" and train.clean_labels is None:
        raise UserError("--trust", "oracle", f"needs the clean labels, which {train.name} does not hold; add --noise")
    task = Task(config, train, test, where)
    select_samples(task, torch.arange(len(train)), train.labels)
    if config.experts.path:
        shared_experts_folder(task)
    return task


def _refuse_config(config: Config) -> torch.device:
    """Refuses what the config alone shows to be wrong; returns the device."""
    parse_noise(config.data.noise)
    augment.parse(config.data.augment)
    if config.net.norm == "batch":
        raise UserError("net.norm", "batch", "trajectories need a network without running statistics; use instance")
    if config.match.min_start > config.match.max_start:
        remedy = f"must not be above match.max_start = {config.match.max_start}"
        raise UserError("match.min_start", config.match.min_start, remedy)
    needed, epochs = config.match.max_start + config.match.expert_epochs, config.experts.epochs
    if epochs is not None and epochs < needed:
        remedy = f"must be at least match.max_start + match.expert_epochs = {needed}"
        raise UserError("experts.epochs", epochs, remedy)
    if config.synthesis != "matching":
        check_refine_config(config)
    set_tf32(config.tf32)
    return resolve_device(config.device)
