"""A config with its data opened and checked, and the samples that are learned from: values, no stage yet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tadperf import device as devices
from tadperf import nets
from tadperf.config import Config
from tadperf.data import Dataset, Normaliser, add_noise, augment, fit, open_data, parse_noise
from tadperf.data import prepare as prepare_images
from tadperf.data.pick import hold_out
from tadperf.errors import UserError
from tadperf.experts import store
from tadperf.nets import FlatNet
from tadperf.progress import Progress, silent
from tadperf.training import Chosen, Images


@dataclass(frozen=True)
class Job:
    """A config with its data opened and every cheap mistake already refused."""

    config: Config
    train: Dataset  # as given, with the noise that was asked for
    test: Dataset
    device: torch.device

    @property
    def epochs(self) -> int:
        """Expert epochs that are trained and stored: as many as matching can use, unless more were asked for."""
        match = self.config.match
        return self.config.experts.epochs or match.max_start + match.expert_epochs


def prepare(config: Config, progress: Progress = silent) -> Job:
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
    job = Job(config, train, test, where)
    samples_of(job, torch.arange(len(train)), train.labels)
    if config.experts.path:
        other_experts(job)
    return job


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
        from tadperf.refine import refuse  # here: that room builds on this module

        refuse(config)
    devices.set_tf32(config.tf32)
    return devices.resolve(config.device)


def identity(job: Job) -> dict[str, Any]:
    """What makes an expert reusable: everything its trajectory depends on."""
    config = job.config
    recipe = config.experts.model_dump(mode="json", exclude={"count", "epochs", "path", "workers"})
    labels = {"trust": config.trust.model_dump(mode="json"), "holdout": config.data.holdout}
    if config.trust.mode == "oracle" and job.train.clean_labels is not None:
        labels["clean"] = job.train.with_labels(job.train.clean_labels, None).fingerprint
    return {
        "data": job.train.fingerprint, **labels, "normalise": config.data.normalise,
        "augment": config.data.augment, "net": config.net.model_dump(mode="json"), "seed": config.seed, **recipe,
    }  # fmt: skip


def other_experts(job: Job) -> Path:
    """The folder of another run's experts; raises UserError where they are incomplete or were trained otherwise."""
    config, train = job.config.experts, job.train
    size = FlatNet(nets.build(job.config.net, train.shape, train.num_classes, 0)).num_parameters
    return store.find(Path(config.path or ""), config.count, (job.epochs + 1, size), identity(job))


@dataclass(frozen=True)
class Arrays:
    """The data as networks see them, on the device."""

    normaliser: Normaliser
    train: Images  # all training images
    labels: Tensor  # of all training images, as given
    test: Images
    test_labels: Tensor


def arrays(job: Job) -> Arrays:
    """Normalises the images; statistics come from the training split alone."""
    normaliser = fit(job.train.images, job.config.data.normalise)
    view = partial(prepare_images, normaliser, device=job.device)
    return Arrays(normaliser, view(job.train.images), job.train.labels, view(job.test.images), job.test.labels)


@dataclass(frozen=True)
class Samples:
    """Which training samples are learned from, under which labels, and which are held out to choose the checkpoint."""

    index: Tensor  # int64 [V] into the training split
    labels: Tensor  # int64 [V]
    weights: Tensor | None  # float32 [V], reliability; None is 1 for all
    certain: Tensor  # bool [V]: those that may be held out and that images may start from
    kept: Tensor  # int64, places among the V: what experts and images may use
    held_out: Tensor  # int64, places among the V


def samples_of(
    job: Job, index: Tensor, labels: Tensor, weights: Tensor | None = None, certain: Tensor | None = None
) -> Samples:
    """Holds a share of the samples out, drawn within each class from the `certain` ones (bool [V], all by default).

    Raises UserError where nothing can be held out, or where a class has fewer samples left than IPC.
    """
    config = job.config
    certain = torch.ones(len(index), dtype=torch.bool) if certain is None else certain
    chosen = certain.nonzero()[:, 0]
    held_out = chosen[hold_out(labels[chosen], config.data.holdout, config.seed)[1]]
    if not len(held_out):
        remedy = f"leaves none of {len(chosen)} samples to choose by; raise it"
        raise UserError("data.holdout", config.data.holdout, remedy)
    mask = torch.ones(len(index), dtype=torch.bool)
    mask[held_out] = False
    kept = mask.nonzero()[:, 0]
    sizes = torch.bincount(labels[kept[certain[kept]]], minlength=job.train.num_classes)
    least = int(sizes.min())
    if config.match.ipc > least:
        name = job.train.class_names[int(sizes.argmin())]
        raise UserError("--ipc", config.match.ipc, f"class {name!r} has only {least} samples to start from; take fewer")
    return Samples(index, labels, weights, certain, kept, held_out)


@dataclass(frozen=True)
class View:
    """The samples of a `Samples` as networks see them, on the device."""

    images: Images
    labels: Tensor
    weights: Tensor | None
    certain: Tensor
    held_out: Images
    held_out_labels: Tensor


def view(data: Arrays, samples: Samples) -> View:
    """Normalised images, labels and weights of the kept and of the held-out samples."""
    kept, held_out = samples.kept, samples.held_out
    weights = None if samples.weights is None else samples.weights[kept]
    return View(
        Chosen(data.train, samples.index[kept]), samples.labels[kept], weights, samples.certain[kept],
        Chosen(data.train, samples.index[held_out]), samples.labels[held_out],
    )  # fmt: skip
