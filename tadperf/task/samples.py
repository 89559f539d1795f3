"""The samples that a task learns from, normalised and on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tadperf.data.images import Chosen, Images, normalise_images
from tadperf.data.normalise import Normaliser, fit_normaliser
from tadperf.data.pick import hold_out
from tadperf.errors import UserError
from tadperf.task.task import Task


@dataclass(frozen=True)
class NormalisedData:
    """The data as networks see them, on the device."""

    normaliser: Normaliser
    train: Images  # all training images
    labels: Tensor  # of all training images, as given
    test: Images
    test_labels: Tensor


def normalise_data(task: Task) -> NormalisedData:
    """Normalises the images; statistics come from the training split alone."""
    normaliser = fit_normaliser(task.train.images, task.config.data.normalise)
    view = partial(normalise_images, normaliser, device=task.device)
    return NormalisedData(
        normaliser, view(task.train.images), task.train.labels, view(task.test.images), task.test.labels
    )


@dataclass(frozen=True)
class SampleSelection:
    """Which training samples are learned from, under which labels, and which are held out to choose the checkpoint."""

    index: Tensor  # int64 [V] into the training split
    labels: Tensor  # int64 [V]
    weights: Tensor | None  # float32 [V], reliability; None is 1 for all
    certain: Tensor  # bool [V]: those that may be held out and that images may start from
    kept: Tensor  # int64, places among the V: what experts and images may use
    held_out: Tensor  # int64, places among the V


def select_samples(
    task: Task, index: Tensor, labels: Tensor, weights: Tensor | None = None, certain: Tensor | None = None
) -> SampleSelection:
    """Holds a share of the samples out, drawn within each class from the `certain` ones (bool [V], all by default).

    Raises UserError where nothing can be held out, or where a class has fewer samples left than IPC.
    """
    config = task.config
    certain = torch.ones(len(index), dtype=torch.bool) if certain is None else certain
    chosen = certain.nonzero()[:, 0]
    held_out = chosen[hold_out(labels[chosen], config.data.holdout, config.seed)[1]]
    if not len(held_out):
        remedy = f"leaves none of {len(chosen)} samples to choose by; raise it"
        raise UserError("data.holdout", config.data.holdout, remedy)
    mask = torch.ones(len(index), dtype=torch.bool)
    mask[held_out] = False
    kept = mask.nonzero()[:, 0]
    sizes = torch.bincount(labels[kept[certain[kept]]], minlength=task.train.num_classes)
    least = int(sizes.min())
    if config.match.ipc > least:
        name = task.train.class_names[int(sizes.argmin())]
        raise UserError("--ipc", config.match.ipc, f"class {name!r} has only {least} samples to start from; take fewer")
    return SampleSelection(index, labels, weights, certain, kept, held_out)


@dataclass(frozen=True)
class TrainingSamples:
    """The samples of a `Samples` as networks see them, on the device."""

    images: Images
    labels: Tensor
    weights: Tensor | None
    certain: Tensor
    held_out: Images
    held_out_labels: Tensor


def training_samples(data: NormalisedData, samples: SampleSelection) -> TrainingSamples:
    """Normalised images, labels and weights of the kept and of the held-out samples."""
    kept, held_out = samples.kept, samples.held_out
    weights = None if samples.weights is None else samples.weights[kept]
    return TrainingSamples(
        Chosen(data.train, samples.index[kept]),
        samples.labels[kept],
        weights,
        samples.certain[kept],
        Chosen(data.train, samples.index[held_out]),
        samples.labels[held_out],
    )
