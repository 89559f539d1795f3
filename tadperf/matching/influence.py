"""Matches the influence of the synthetic images on the parameters of stored snapshots with that of the real images.

    a = H_D G_S + H_S G_D,    b = 2 H_D G_D,
    L = 1/l sum_l |a_l - b_l|^2 / (|a_l|^2 + |b_l|^2)  +  w KL(y || softmax(f(A(x); theta_t')))

G_D, H_D: gradient and Hessian, by the parameters theta_t of an expert's snapshot, of the mean cross-entropy of the real
images. G_S, H_S: those of the synthetic images. l: the layers. theta_t': the same expert after t' epochs,
t <= t' <= t + match.expert_epochs. For hard labels the second term is the cross-entropy.

Published as InfMatch (Tan et al., CVPR 2026, arXiv:2607.16859). Its abstract: match the shift of the parameters that
the synthetic set causes with that of the real set, by an estimator from unrolled training and a first-order Taylor
expansion, without inverse Hessians. Its public code: the residual a - b at one snapshot with its squares averaged over
all parameters, products H v by differences of gradients (step / |v|, one-sided, 1e-3), real images in new batches, and
a cross-entropy under the final expert. The body of the paper was not available. The only public setting (CIFAR-10,
50 images per class) switches the residual off, and matches class-wise features of the last layer instead.

Here (tadperf): G_D and H_D G_D are weighted means over all trusted samples with their corrected labels, and are
computed once per snapshot. A product H_D v needs a pass over the real images in every iteration, so it takes a batch B
of them: H_D G_S becomes H_B (G_S - G_D) + H_D G_D, whose noise vanishes as G_S approaches G_D. Differences are
two-sided. The loss is relative within each layer, and lies between 0 and 2: late snapshots have small gradients.
L depends on G_S by H_B, which is symmetric, so its derivative is another product with H_B. No real image is
differentiated twice. The second derivatives of the synthetic images come from the `StepBackend`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf import seeds
from tadperf.compute.transfer import upload_all
from tadperf.data import augment
from tadperf.data.image_draws import ImageDraws
from tadperf.data.images import first_image, index_device
from tadperf.matching.base import Base, MatchProblem, draw_generator, image_gradient
from tadperf.matching.class_features import BLOCK, KEPT_BYTES, Body
from tadperf.matching.features import divergence, draw_rows
from tadperf.matching.gradient import Gradient
from tadperf.matching.starts import draw_snapshots
from tadperf.matching.state import EXPLODED, MatchState
from tadperf.matching.step_backends import StepBackend, choose_step_backend
from tadperf.nets.training import cache_batch_size

STEP = 3e-2  # length of a step in parameter space for a difference of gradients; see bench/results/bases.md
REAL_BATCH = 256  # real images in a product H_B v; not tuned


class Influence(NamedTuple):
    """G_D and H_D G_D [P] of the real samples under a snapshot."""

    gradient: Tensor
    curved: Tensor


class Draws(NamedTuple):
    """What an iteration draws: theta_t and theta_t' [P], the images, and a batch of real images with its labels."""

    first: Tensor
    later: Tensor
    real: Influence
    synthetic: ImageDraws
    x: Tensor
    y: Tensor


def curvature(gradient: Callable[[Tensor], Tensor], theta: Tensor, v: Tensor) -> Tensor:
    """Returns H v [P] by a two-sided difference of gradients, STEP apart from theta in the direction of v."""
    step = STEP / v.norm().clamp_min(1e-12)
    return (gradient(theta + step * v) - gradient(theta - step * v)) / (2 * step)


def relative_loss(a: Tensor, b: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns |a - b|^2 / (|a|^2 + |b|^2) of each layer [layers], and the derivative by a [P] of their mean.

    sizes: the number of parameters of each layer, in their order in a and b [P].
    """
    losses, slopes = [], []
    for a_l, b_l in zip(a.split(list(sizes)), b.split(list(sizes)), strict=True):
        norm = (a_l.square().sum() + b_l.square().sum()).clamp_min(1e-24)
        losses.append((a_l - b_l).square().sum() / norm)
        slopes.append((2 / len(sizes)) * (a_l - b_l - losses[-1] * a_l) / norm)
    return torch.stack(losses), torch.cat(slopes)


def influence_gradient(
    backend: StepBackend,
    sizes: Sequence[int],
    theta: Tensor,
    real: Influence,
    batch: tuple[Tensor, Tensor],
    x: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the loss of each layer [layers], and the gradients of their mean by x, and by y if it is logits.

    theta: theta_t [P]. batch: real images and their labels. x: augmented synthetic images [B, C, H, W]. y: labels
    int64 [B], or logits [B, K].
    """

    def of_real(at: Tensor) -> Tensor:
        return backend.gradient(at, *batch)

    def of_synthetic(at: Tensor) -> Tensor:
        return backend.gradient(at, x, y)

    a = curvature(of_real, theta, of_synthetic(theta) - real.gradient) + real.curved
    a = a + curvature(of_synthetic, theta, real.gradient)
    layers, slope = relative_loss(a, 2 * real.curved, sizes)
    # a depends on x by H_B G_S and by the two gradients g_S(theta +- step G_D) / (2 step).
    step = STEP / real.gradient.norm().clamp_min(1e-12)
    weighted = slope / (2 * step)
    parts = [
        backend.products(theta, curvature(of_real, theta, slope), x, y, False),
        backend.products(theta + step * real.gradient, weighted, x, y, False),
        backend.products(theta - step * real.gradient, -weighted, x, y, False),
    ]
    labels = [part.labels for part in parts if part.labels is not None]
    return layers, parts[0].x + parts[1].x + parts[2].x, sum(labels[1:], labels[0]) if labels else None


class RealInfluence:
    """Computes the `Influence` of the real samples on a snapshot, once for each snapshot (tadperf).

    Every sample counts with its weight and its corrected label, under one drawn augmentation. The draws depend on seed,
    expert and epoch alone, so a resumed run and every rank get the same bytes.
    """

    def __init__(self, problem: MatchProblem, device: torch.device) -> None:
        assert problem.real is not None, "influence matching needs the real samples"
        self.problem, self.device, (self.images, labels, weights) = problem, device, problem.real
        self.labels = labels.to(device)
        weights = torch.ones(len(labels)) if weights is None else weights
        self.weights = (weights.double() / weights.double().sum()).cpu()
        self._share = self.weights.to(device, torch.float32)
        fused = device.type == "cuda" or problem.config.precision == "float32"
        self._body = Body(problem.net.module, fused)
        self._most = max(1, KEPT_BYTES // (8 * problem.net.num_parameters))
        self._kept: dict[tuple[int, int], Influence] = {}

    def __call__(self, expert: int, epoch: int, theta: Tensor) -> Influence:
        """theta: the snapshot [P] of this expert after this epoch, on the device."""
        key = (expert, epoch)
        if key not in self._kept:
            while len(self._kept) >= self._most:
                del self._kept[next(iter(self._kept))]
            gradient = partial(self._gradient, key)
            first = gradient(theta)
            self._kept[key] = Influence(first, curvature(gradient, theta, first))
        return self._kept[key]

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws augmented real images and their labels, each sample with a probability that is its weight."""
        # The cumulative weights serve any number of samples; torch.multinomial takes at most 2^24.
        rows = torch.searchsorted(self.weights.cumsum(0), torch.rand(count, generator=generator, dtype=torch.float64))
        rows = rows.clamp_max(len(self.weights) - 1)
        drawn = augment.draw(self.problem.augment, count, first_image(self.images).shape[-1], generator)
        index, drawn = ImageDraws(rows, drawn).to(self.device)
        lookup = index if index_device(self.images) == self.device else rows
        return augment.apply(self.images[lookup].to(self.device), drawn), self.labels[index]

    def _gradient(self, key: tuple[int, int], theta: Tensor) -> Tensor:
        """Returns the gradient [P] of the weighted mean cross-entropy of all samples at theta."""
        problem, image = self.problem, first_image(self.images)
        block = min(BLOCK, cache_batch_size(problem.net.module, image[0, 0].numel()))
        generator, total = seeds.generator(problem.seed, "real influence", *key), torch.zeros_like(theta)
        precision = getattr(torch, problem.config.precision)
        for rows in torch.arange(len(self.images), device=index_device(self.images)).split(block):
            drawn = augment.draw(problem.augment, len(rows), image.shape[-1], generator)
            x, index = augment.apply(self.images[rows].to(self.device), drawn), rows.to(self.device)
            at = theta.detach().requires_grad_()
            with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
                views = {f"layers.{name}": view for name, view in problem.net.views(at).items()}
                losses = F.cross_entropy(
                    torch.func.functional_call(self._body, views, (x,)), self.labels[index], reduction="none"
                )
            total += torch.autograd.grad(self._share[index] @ losses.float(), at)[0]
        return total


class InfluenceMatching(Base):
    """The base of infmatch. Synthetic images lie class by class, the same number of each class.

    A draw chooses an expert, its epochs t and t', the images with their augmentations, and a batch of real images.
    """

    def __init__(self, state: MatchState, problem: MatchProblem) -> None:
        super().__init__(state, problem)
        config, device, net = problem.config, state.images.device, problem.net
        assert problem.real is not None
        self.sizes, self.layers = list(net.layer_sizes.values()), [*net.layer_sizes, "cross-entropy"]
        self.num_classes = int(problem.real.labels.max()) + 1
        assert len(state.images) % self.num_classes == 0
        count = min(config.batch or len(state.images), len(state.images))
        shape = (count, *state.images.shape[1:])
        self.backend = choose_step_backend(config, net, shape, device, config.iterations)
        self.cache = self.backend.cache
        self.exploded = EXPLODED * (1 + config.cross_entropy)
        self.real = RealInfluence(problem, device)

    def gradient(self, state: MatchState, number: int) -> Gradient:
        weight, draws = self.problem.config.cross_entropy, self.draw(state, number)
        rows, drawn = draws.synthetic
        x, adjoint_of_augmentation = augment.apply_with_adjoint(state.images[rows], drawn)
        y = state.labels[rows]
        layers, grad_x, grad_y = influence_gradient(
            self.backend, self.sizes, draws.first, draws.real, (draws.x, draws.y), x, y
        )
        loss, further = layers.mean(), torch.zeros_like(layers[0])
        if weight:
            further, more_x, more_y = self._divergence(draws.later, x, y)
            loss, grad_x = loss + weight * further, grad_x + weight * more_x
            grad_y = grad_y + weight * more_y if grad_y is not None and more_y is not None else None
        images = torch.zeros_like(state.images).index_copy_(
            0, rows, adjoint_of_augmentation(grad_x).to(state.images.dtype)
        )
        labels = None if grad_y is None else torch.zeros_like(state.labels).index_copy_(0, rows, grad_y)
        return image_gradient(loss, images, labels, torch.cat([layers, further[None]]))

    def _divergence(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the divergence under a snapshot, and its gradients by x, and by y if it is logits."""
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_(y.is_floating_point())
        loss = divergence(self.problem.net(theta, x), y)
        grads = torch.autograd.grad(loss, [x] + [y] * y.requires_grad)
        return loss.detach(), grads[0], grads[1] if y.requires_grad else None

    def draw(self, state: MatchState, number: int) -> Draws:
        """Draws an expert, two of its snapshots, and the synthetic and real images with their augmentations."""
        problem, config, device = self.problem, self.problem.config, state.images.device
        generator = draw_generator(problem, state, number)
        expert, start, end = draw_snapshots(len(problem.experts), config, state.iteration, generator)
        rows = draw_rows(len(state.images), self.num_classes, config.batch, generator)
        drawn = augment.draw(problem.augment, len(rows), state.images.shape[-1], generator)
        x, y = self.real.batch(REAL_BATCH, generator)
        first, later = upload_all([problem.experts.snapshot(expert, epoch) for epoch in (start, end)], device)
        return Draws(first, later, self.real(expert, start, first), ImageDraws(rows, drawn).to(device), x, y)
