"""Guidance while a UNet denoises: toward the trusted features of a class, and away from its other images.

The features are those of the denoiser's middle block at the same noise level, so nothing is trained for guidance.
Diffusion As Priors (arXiv 2510.17421) guides by a kernel between the denoiser's features of generated and real images.
Particle Guidance (arXiv 2310.13102) adds a joint term that keeps images apart. The size of a step is Polyak's, as in
arXiv 2403.12404. The two energies are tadperf's: they are 0 for an image that is as near to its class, and as far from
the others, as trusted images are. So they never pull images closer than that, or push them farther apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tadperf import seeds
from tadperf.config import RefineConfig
from tadperf.errors import UserError
from tadperf.refine.models import sampling
from tadperf.refine.models.base import Target

PER_CLASS = 64  # trusted images of each class that the features are compared with; not tuned
FLOOR = 1e-3  # smallest variance of a feature, as a share of the mean variance; not tuned
TINY = 1e-12  # smallest value that is divided by

Predict = Callable[[Tensor, Tensor], Tensor]  # (noised images [B, ...], timestep) -> the model's prediction [B, ...]


class ClassFeatures(NamedTuple):
    """Features of trusted images at one noise level: C classes, D features.

    mean: [C, D]. deviation: [D], within the classes. spread: [C], the mean squared distance of a class's images from
    their mean, in deviations and per feature; 1 on average over the images.
    """

    mean: Tensor
    deviation: Tensor
    spread: Tensor


class Guide(NamedTuple):
    """Holds the layer of the features, the trusted features of a timestep, the noise levels and the two strengths."""

    layer: nn.Module
    trusted: Callable[[Tensor], ClassFeatures]
    scheduler: Any
    attraction: float
    repulsion: float


def is_guided(config: RefineConfig) -> bool:
    """Returns whether guidance is on."""
    return config.attraction > 0 or config.repulsion > 0


@contextlib.contextmanager
def captured(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the results of `layer` inside the block, one for each call: channels averaged over positions, [B, D].

    Takes a layer that returns [B, D, H, W]. On digits, features of every position told the classes of noised images
    apart better (83 against 66 % at timestep 319) but guided worse: at attraction 1 the judge's agreement fell from
    0.99 to 0.51, with averages (of images under their labels) to 0.98.
    """
    results: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: results.append(output.mean((2, 3))))
    try:
        yield results
    finally:
        handle.remove()


def class_features(features: Tensor, labels: Tensor, num_classes: int) -> ClassFeatures:
    """Returns the statistics of features [N, D] with labels int64 [N]. Every class needs an image."""
    counts = torch.bincount(labels, minlength=num_classes).to(features)
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    mean = sums / counts[:, None]
    centred = features - mean[labels]
    variance = centred.square().mean(0)
    deviation = variance.clamp(min=max(FLOOR * float(variance.mean()), TINY)).sqrt()
    distances = (centred / deviation).square().mean(1)
    return ClassFeatures(mean, deviation, counts.new_zeros(num_classes).index_add_(0, labels, distances) / counts)


def open_guide(
    layer: nn.Module | None,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
    scheduler: Any,
    config: RefineConfig,
    target: Target,
) -> Guide:
    """Returns the guide of a model. Raises UserError if the model has no layer to take features from.

    predict: runs the model on (noised images [B, ...], timestep, classes int64 [B]). encode: maps uint8 images to the
    model's space. The trusted features of a timestep are computed when they are first needed.
    """
    if layer is None:
        remedy = "has no middle block, whose features guide; set refine.attraction and refine.repulsion to 0"
        raise UserError("refine.source", config.source, remedy)
    assert target.trusted is not None
    images, labels = target.trusted
    labels, classes = labels.to(target.device), len(target.class_names)
    encoded = torch.cat([encode(part) for part in images.split(config.batch)])
    noise = sampling.image_noise(encoded.shape[1:], [seeds.derive(0, "guidance", i) for i in range(len(images))])
    noise, known = noise.to(encoded), dict[int, ClassFeatures]()

    @torch.no_grad()
    def trusted(timestep: Tensor) -> ClassFeatures:
        if int(timestep) not in known:
            noised = scheduler.add_noise(encoded, noise, timestep.expand(len(encoded)))
            features = []
            for part, part_labels in zip(noised.split(config.batch), labels.split(config.batch), strict=True):
                with captured(layer) as results:
                    predict(part, timestep, part_labels)
                features.append(results[0][-len(part) :])
            known[int(timestep)] = class_features(torch.cat(features), labels, classes)
        return known[int(timestep)]

    return Guide(layer, trusted, scheduler, config.attraction, config.repulsion)


def attraction_energy(features: Tensor, labels: Tensor, trusted: ClassFeatures) -> Tensor:
    """Returns how much farther than a trusted image each image is from its class's mean, [B]; 0 if it is not (tadperf).

    features: [B, D]; labels: int64 [B]. Distances are squared and per feature, in deviations.
    """
    distance = ((features - trusted.mean[labels]) / trusted.deviation).square().mean(1)
    return (distance - trusted.spread[labels]).clamp(min=0)


def repulsion_energy(features: Tensor, labels: Tensor, trusted: ClassFeatures) -> Tensor:
    """Returns how close each image is to the other images of its class, [B]; in [0, 1] (tadperf).

    features: [B, D]; labels: int64 [B]. A pair counts 1 at distance 0, and 0 if it is as far apart as two trusted
    images are on average. The energy is the mean over the other images of the class; 0 for a single image.
    """
    points = features / trusted.deviation
    square = points.square().mean(1)
    distance = square[:, None] + square - 2 * points @ points.T / points.shape[1]
    pair = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    closeness = (1 - distance / (2 * trusted.spread[labels])[:, None].clamp(min=TINY)).clamp(min=0)
    return (closeness * pair).sum(1) / pair.sum(1).clamp(min=1)


def polyak_step(energy: Tensor, gradient: Tensor) -> Tensor:
    """Returns the step [B, ...] that brings each linearised energy [B] to 0 (Polyak, 1969; the least energy is 0)."""
    square = gradient.flatten(1).square().sum(1).clamp(min=TINY)
    return gradient * (energy / square).view(-1, *[1] * (gradient.ndim - 1))


def shift_estimate(prediction: Tensor, shift: Tensor, alpha: Tensor, kind: str) -> Tensor:
    """Returns the prediction whose denoised estimate is that of `prediction` minus `shift`, at the same noised image.

    alpha: the share of the signal's variance at this timestep, alphas_cumprod. kind: the scheduler's prediction_type.
    """
    if kind == "sample":
        return prediction - shift
    if kind == "epsilon":
        return prediction + (alpha / (1 - alpha)).sqrt() * shift
    assert kind == "v_prediction"
    return prediction + shift / (1 - alpha).sqrt()


def guided_prediction(guide: Guide, predict: Predict, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    """Returns the model's prediction for noised images x [B, ...] after one step of guidance on the denoised estimate.

    predict: runs the model once, on x under the labels int64 [B]; if it also runs on x without labels, these rows come
    last. The features are those of the last B rows: on digits, without labels they told the classes of noised images
    apart more often (66 against 58 % at timestep 319). The two energies are averaged by their strengths, and the step
    is as long as the sum of the strengths. Differentiates the model once, by x, up to the layer of the features.
    """
    trusted = guide.trusted(timestep)
    strength = guide.attraction + guide.repulsion
    with torch.enable_grad(), captured(guide.layer) as results:
        x = x.detach().requires_grad_()
        prediction = predict(x, timestep)
        features = results[0][-len(x) :]
        attraction = attraction_energy(features, labels, trusted) if guide.attraction else torch.zeros(())
        repulsion = repulsion_energy(features, labels, trusted) if guide.repulsion else torch.zeros(())
        energy = (guide.attraction * attraction + guide.repulsion * repulsion) / strength
        (gradient,) = torch.autograd.grad(energy.sum(), x)
    shift = strength * polyak_step(energy.detach(), gradient)
    alpha = guide.scheduler.alphas_cumprod.to(x.device)[timestep]
    return shift_estimate(prediction.detach(), shift, alpha, guide.scheduler.config.prediction_type)
