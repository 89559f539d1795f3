"""Matches class-wise mean features of synthetic and real images under stored snapshots of the experts.

    L = ( 1/K sum_c |m_c - r_c|^2  +  w KL(y || softmax(f(A(x); theta_t'))) ) / S

m_c: the mean features of the synthetic images A(x) of class c under the snapshot theta_t of an expert. r_c: that of the
real images. theta_t': the same expert after t' epochs, t <= t' <= t + match.expert_epochs. For hard labels the second
term is the cross-entropy. There is no inner loop and no second derivative.

Published as TGDD (Ran et al., AAAI 2026, arXiv:2512.02469): the two terms, on penultimate features, with theta_t from
any epoch of a few experts and theta_t' at most some epochs later. The public code uses 5 experts of 60 epochs,
t' <= t + 6, w = 1, no division by S, a new batch of real images in each iteration, and one step of SGD per class.

Here (tadperf): r_c is the weighted mean over all trusted samples with their corrected labels, and is computed once per
snapshot. S is the variance of the real features, summed over their D entries; for a ConvNet of width 128 on CIFAR-10 it
is 280 to 360, for one of width 32 on the digits 4 to 38. So the distance is relative, and w keeps its published scale.
All classes share one step. The derivative of the KL divergence by the images is
that of the cross-entropy, and soft labels follow the predictions of the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.compute.compile import load_compile_cache, with_fallback
from tadperf.compute.cuda_graphs import GraphedStep
from tadperf.compute.transfer import upload_all
from tadperf.data import augment
from tadperf.data.augment import Draw
from tadperf.data.image_draws import ImageDraws
from tadperf.matching.base import Base, MatchProblem, draw_generator, image_gradient
from tadperf.matching.class_features import ClassMeans, FeatureNet, RealFeatures
from tadperf.matching.gradient import Gradient
from tadperf.matching.starts import draw_snapshots
from tadperf.matching.state import EXPLODED, MatchState


class Snapshots(NamedTuple):
    """The parameter vectors theta_t and theta_t' [P], and the real features under theta_t."""

    first: Tensor
    later: Tensor
    real: ClassMeans


class Losses(NamedTuple):
    """The two terms of the loss as one tensor [2], and its gradients by the batch and by label logits, if any."""

    terms: Tensor
    x: Tensor
    labels: Tensor | None


# (theta_t, theta_t', r [K, D], S, batch, labels of the batch) -> Losses
FeatureGradient = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Losses]


def feature_losses(
    net: FeatureNet, weight: float, first: Tensor, later: Tensor, means: Tensor, scatter: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the loss, and its terms [2]: the relative distance, and the divergence without w / S (0 if w is 0).

    first, later: theta_t and theta_t' [P]. means, scatter: r [K, D] and S. x: augmented images [B, C, H, W] class by
    class, B / K of each. y: labels int64 [B], or label logits [B, K].
    """
    features = net.features(first, x).to(means.dtype)
    synthetic = features.view(len(means), -1, features.shape[1]).mean(1)
    distance = (synthetic - means).square().sum(1).mean() / scatter
    further = torch.zeros_like(distance)
    if weight:
        further = divergence(net.logits(later, net.features(later, x)).to(means.dtype), y)
    return distance + weight / scatter * further, torch.stack([distance, further])


def divergence(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the mean KL divergence from labels to predictions; for hard labels it is the cross-entropy.

    logits: predictions [B, K]. y: labels int64 [B], or label logits [B, K].
    """
    log_q = F.log_softmax(logits, 1)
    if y.is_floating_point():
        return F.kl_div(log_q, F.log_softmax(y, 1), reduction="batchmean", log_target=True)
    return F.nll_loss(log_q, y)


def eager_gradient(net: FeatureNet, weight: float, precision: torch.dtype) -> FeatureGradient:
    """Returns the gradient of the loss by autograd, which differentiates once."""

    def compute(first: Tensor, later: Tensor, means: Tensor, scatter: Tensor, x: Tensor, y: Tensor) -> Losses:
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_(y.is_floating_point())
        with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
            loss, terms = feature_losses(net, weight, first, later, means, scatter, x, y)
        inputs = [x] + [y] * y.requires_grad
        grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        return Losses(terms.detach(), grads[0], grads[1] if y.requires_grad else None)

    return compute


def functional_gradient(net: FeatureNet, weight: float, precision: torch.dtype) -> FeatureGradient:
    """Returns the same by torch.func.grad, which torch.compile takes as one region."""

    def compute(first: Tensor, later: Tensor, means: Tensor, scatter: Tensor, x: Tensor, y: Tensor) -> Losses:
        def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
                return feature_losses(net, weight, first, later, means, scatter, x, y)

        soft = y.is_floating_point()
        grads, terms = torch.func.grad(loss, (0, 1) if soft else (0,), has_aux=True)(x, y)
        return Losses(terms, grads[0], grads[1] if soft else None)

    return compute


def choose_feature_gradient(
    problem: MatchProblem, device: torch.device
) -> tuple[FeatureNet, FeatureGradient, str | None]:
    """Returns the network, its gradient as match.compile says, and the key of the compiled code, if there is some.

    "auto" compiles nothing: norm, ReLU and pool are compiled operators, and on CUDA one graph holds all launches.
    """
    config = problem.config
    precision = getattr(torch, config.precision)
    # The CPU's fused operators have no autocast rule.
    net = FeatureNet(problem.net, fused=device.type == "cuda" or precision == torch.float32)
    eager = eager_gradient(net, config.cross_entropy, precision)
    if config.compile != "on":
        return net, eager, None
    key = f"features {problem.net.num_parameters}"
    load_compile_cache(key)
    plain = functional_gradient(FeatureNet(problem.net, fused=False), config.cross_entropy, precision)
    compiled = with_fallback(
        "torch.compile", lambda: torch.compile(plain, fullgraph=True, dynamic=False), "eager", lambda: eager
    )
    return net, compiled, key


def batch_gradient(
    compute: FeatureGradient,
    weight: float,
    snapshots: Snapshots,
    images: Tensor,
    labels: Tensor,
    rows: Tensor,
    drawn: Draw,
) -> Gradient:
    """Returns the gradient of the loss on the augmented images at `rows` (int64 [B], each at most once)."""
    batch, adjoint_of_augmentation = augment.apply_with_adjoint(images[rows], drawn)
    losses = compute(snapshots.first, snapshots.later, *snapshots.real, batch, labels[rows])
    grad_images = torch.zeros_like(images).index_copy_(0, rows, adjoint_of_augmentation(losses.x).to(images.dtype))
    loss, grad_labels = losses.terms[0] + weight / snapshots.real.scatter * losses.terms[1], None
    if losses.labels is not None:
        grad_labels = torch.zeros_like(labels).index_copy_(0, rows, losses.labels)
    return image_gradient(loss, grad_images, grad_labels, losses.terms)


class GraphedFeatures:
    """Computes `batch_gradient` as one CUDA graph per iteration, instead of kernel by kernel. CUDA only (tadperf)."""

    def __init__(self, compute: FeatureGradient, weight: float) -> None:
        self._function = partial(batch_gradient, compute, weight)
        self._memory: list[Tensor] = []  # fixed memory that the graph writes into: loss, images, terms, labels
        self.graphed_step = GraphedStep(self._write)

    def __call__(self, snapshots: Snapshots, images: Tensor, labels: Tensor, rows: Tensor, drawn: Draw) -> Gradient:
        if not self._memory:
            soft = [torch.empty_like(labels)] if labels.is_floating_point() else []
            self._memory = [images.new_empty(()), torch.empty_like(images), images.new_empty(2), *soft]
        first, later, (means, scatter) = snapshots
        self.graphed_step(first, later, means, scatter, images, labels, rows, *drawn)
        loss, grad_images, terms, *soft = (value.clone() for value in self._memory)  # the next call overwrites them
        return image_gradient(loss, grad_images, soft[0] if soft else None, terms)

    def _write(
        self,
        first: Tensor,
        later: Tensor,
        means: Tensor,
        scatter: Tensor,
        images: Tensor,
        labels: Tensor,
        rows: Tensor,
        *drawn: Tensor | None,
    ) -> None:
        snapshots = Snapshots(first, later, ClassMeans(means, scatter))
        gradient = self._function(snapshots, images, labels, rows, Draw(*drawn))
        values = [gradient.loss, gradient.images, gradient.layers, gradient.labels]
        for memory, value in zip(self._memory, values, strict=False):
            assert value is not None
            memory.copy_(value)


def draw_rows(count: int, classes: int, batch: int | None, generator: torch.Generator) -> Tensor:
    """Returns the synthetic images of an iteration, int64 [B], class by class: all, or the same number of each class.

    count: synthetic images, stored class by class. batch: the most images to draw; None for all.
    """
    ipc = count // classes
    each = min(ipc, (batch or count) // classes)
    if each == ipc:
        return torch.arange(count)
    chosen = torch.rand(classes, ipc, generator=generator).argsort(1)[:, :each]
    return (chosen + ipc * torch.arange(classes)[:, None]).flatten()


class FeatureMatching(Base):
    """The base of tgdd. Synthetic images lie class by class, the same number of each class.

    A draw chooses an expert, its epochs t and t', the images and their augmentations.
    """

    layers = ("features", "cross-entropy")

    def __init__(self, state: MatchState, problem: MatchProblem) -> None:
        super().__init__(state, problem)
        config, device = problem.config, state.images.device
        self.net, compute, self.cache = choose_feature_gradient(problem, device)
        assert len(state.images) % self.net.num_classes == 0
        # Both terms may grow to the limit of a loss.
        self.exploded = EXPLODED * (1 + config.cross_entropy)
        self.real = RealFeatures(problem, self.net, device)
        self.compute = partial(batch_gradient, compute, config.cross_entropy)
        if device.type == "cuda" and config.compile != "off":
            self.compute = GraphedFeatures(compute, config.cross_entropy)

    def gradient(self, state: MatchState, number: int) -> Gradient:
        snapshots, draws = self.draw(state, number)
        return self.compute(snapshots, state.images, state.labels, draws.order, draws.drawn)

    def draw(self, state: MatchState, number: int) -> tuple[Snapshots, ImageDraws]:
        """Draws an expert, two of its snapshots, and the images with their augmentations."""
        problem, config, device = self.problem, self.problem.config, state.images.device
        generator = draw_generator(problem, state, number)
        expert, start, end = draw_snapshots(len(problem.experts), config, state.iteration, generator)
        rows = draw_rows(len(state.images), self.net.num_classes, config.batch, generator)
        drawn = augment.draw(problem.augment, len(rows), state.images.shape[-1], generator)
        first, later = upload_all([problem.experts.snapshot(expert, epoch) for epoch in (start, end)], device)
        draws = ImageDraws(rows, drawn).to(device)
        return Snapshots(first, later, self.real(expert, start, first)), draws
