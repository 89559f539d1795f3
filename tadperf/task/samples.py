"""Selects the samples that a run learns from, normalised and on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from tadperf.data.images import Images, ImageSubset, device_pixels, normalise_images
from tadperf.data.normalise import Normaliser, fit_normaliser
from tadperf.data.pick import hold_out
from tadperf.errors import UserError
from tadperf.task.task import Task


@dataclass(frozen=True)
class NormalisedData:
    """All images, normalised and on the device, and their labels."""

    normaliser: Normaliser
    train: Images
    labels: Tensor  # of the training images, as given
    test: Images
    test_labels: Tensor


def normalise_data(task: Task) -> NormalisedData:
    """Normalises the images. The statistics come from the training split alone."""
    pixels = device_pixels(task.train.images, task.device)
    normaliser = fit_normaliser(pixels, task.config.data.normalise, task.device)
    normalise = partial(normalise_images, normaliser.to(task.device), device=task.device)
    return NormalisedData(
        normaliser, normalise(pixels), task.train.labels, normalise(task.test.images), task.test.labels
    )


@dataclass(frozen=True)
class SampleSelection:
    """The V training samples that a run learns from, and their division into training and held-out samples.

    confirmed: trust found the given label correct (verdict trusted or recalled). Only these samples may be held out or
    become synthetic images.
    """

    index: Tensor  # int64 [V], rows of the training split
    labels: Tensor  # int64 [V]
    weights: Tensor | None  # reliability, float32 [V]; None means 1 for all
    confirmed: Tensor  # bool [V]
    training: Tensor  # int64, positions in 0..V-1 of the samples for experts and images
    held_out: Tensor  # int64, positions of the samples that choose the checkpoint


def select_samples(
    task: Task, index: Tensor, labels: Tensor, weights: Tensor | None = None, confirmed: Tensor | None = None
) -> SampleSelection:
    """Holds out a share of the samples, drawn within each class from the confirmed ones (bool [V]; None means all).

    Raises UserError if nothing can be held out, or if a class has fewer confirmed samples left than the set
    has images of it.
    """
    config = task.config
    confirmed = torch.ones(len(index), dtype=torch.bool) if confirmed is None else confirmed
    candidates = confirmed.nonzero()[:, 0]
    held_out = candidates[hold_out(labels[candidates], config.data.holdout, config.seed)[1]]
    if not len(held_out):
        remedy = f"too small: no samples are held out of {len(candidates)}; increase it"
        raise UserError("data.holdout", config.data.holdout, remedy)
    mask = torch.ones(len(index), dtype=torch.bool)
    mask[held_out] = False
    training = mask.nonzero()[:, 0]
    sizes = torch.bincount(labels[training[confirmed[training]]], minlength=task.train.num_classes)
    if config.match.seen > int(sizes.min()):
        label = int(sizes.argmin())
        _refuse_small_class(task, label, int((labels[candidates] == label).sum()), int(sizes[label]))
    return SampleSelection(index, labels, weights, confirmed, training, held_out)


def _refuse_small_class(task: Task, label: int, confirmed: int, left: int) -> NoReturn:
    """Raises UserError: says what made the class too small, and what to do.

    confirmed: the number of its confirmed samples. left: how many of these are not held out.
    """
    config, name = task.config, task.train.class_names[label]
    given = int((task.train.labels == label).sum())
    reasons = [f"class {name!r} has only {left} samples to start from"]
    if confirmed != given:
        change = "confirmed" if config.trust.mode == "on" else "correct"
        reasons.append(f"{confirmed} of its {given} labels are {change}")
    if left != confirmed:
        reasons.append(f"{confirmed - left} samples are held out (data.holdout)")
    factor = config.match.factor
    most = left // factor**2
    if factor > 1:
        reasons.append(f"match.factor={factor} needs {config.match.seen}")
    remedies = [f"use at most {most}"] if most else []
    if config.trust.mode == "on" and given > confirmed:
        remedies.append("use --trust off")
    remedies.append("add images of this class, or remove the class")
    raise UserError("--ipc", config.match.ipc, f"{', '.join(reasons)}; {', or '.join(remedies)}")


def check_holdout(task: Task) -> None:
    """Raises UserError if the samples are too few for data.holdout and match.ipc, even if all given labels are trusted.

    With trust.mode on, every class needs two samples: the dual loop scores a sample with a network that was trained
    without it. If a class has only one sample, this network does not know the class.
    """
    select_samples(task, torch.arange(len(task.train)), task.train.labels)
    sizes = torch.bincount(task.train.labels, minlength=task.train.num_classes)
    if task.config.trust.mode == "on" and int(sizes.min()) < 2:
        name = task.train.class_names[int(sizes.argmin())]
        remedy = f"class {name!r} has only 1 training sample, too few to judge its label; add images or use --trust off"
        raise UserError("data", task.config.data.path, remedy)


@dataclass(frozen=True)
class TrainingSamples:
    """The samples of a `SampleSelection`, normalised and on the device."""

    images: Images
    labels: Tensor
    weights: Tensor | None
    confirmed: Tensor
    held_out: Images
    held_out_labels: Tensor

    @property
    def confirmed_labels(self) -> Tensor:
        """Returns the labels of the confirmed samples; -1 for the others."""
        return self.labels.where(self.confirmed, -1)


def training_samples(data: NormalisedData, selection: SampleSelection) -> TrainingSamples:
    """Returns the images, labels and weights of the training samples, and the held-out images and labels."""
    training, held_out = selection.training, selection.held_out
    weights = None if selection.weights is None else selection.weights[training]
    return TrainingSamples(
        ImageSubset(data.train, selection.index[training]),
        selection.labels[training],
        weights,
        selection.confirmed[training],
        ImageSubset(data.train, selection.index[held_out]),
        selection.labels[held_out],
    )
