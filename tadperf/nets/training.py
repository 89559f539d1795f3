"""One training loop for experts, students and baselines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf import seeds
from tadperf.compute.cuda_graphs import GraphedStep
from tadperf.data import augment
from tadperf.data.images import Images
from tadperf.kernels import per_sample
from tadperf.nets.fused import fused_forward

CACHE_ACTIVATIONS = 1 << 22  # activations
DRAW_CHUNK = 1 << 19  # values that are augmented, and images' values whose augmentations are drawn, in one call


class Recipe(NamedTuple):
    """How a network is trained: SGD, learning rate x 0.1 after half of the epochs where `decay` is set.

    Where rho > 0 it takes the gradient of `flat_gradient`, which costs a second pass.
    """

    epochs: int
    batch: int
    lr: float
    momentum: float
    weight_decay: float
    augment: str
    decay: bool = True
    rho: float = 0.0
    alpha: float = 0.0


@torch.no_grad()
def sgd_step(
    parameters: tuple[Tensor, ...],
    velocity: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """One step of SGD in place, as torch.optim.SGD takes it; of all parameters at once.

    Not that class: the first optimiser of a process imports the compiler, 2 s in every worker of every pool.
    """
    torch._foreach_mul_(velocity, momentum)
    torch._foreach_add_(velocity, gradients)
    if weight_decay:
        torch._foreach_add_(velocity, parameters, alpha=weight_decay)
    torch._foreach_add_(parameters, velocity, alpha=-lr)


def batch_loss(module: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Mean cross-entropy of a batch x [B, C, H, W], each sample times its weight [B] where there are any."""
    if weights is None:
        return F.cross_entropy(module(x), target)
    return (weights * F.cross_entropy(module(x), target, reduction="none")).mean()


def summed_gradient(losses: Iterable[Tensor], parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradient of a sum of losses, each differentiated before the next is made; zeros where it does not depend."""
    total: tuple[Tensor, ...] = ()
    for loss in losses:
        part = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        if total:
            torch._foreach_add_(total, part)
        else:
            total = part
    return total


def cache_batch_size(module: nn.Module, pixels: int) -> int:
    """Images whose widest map stays near the cores, on a CPU: so many at a time are trained on (tadperf).

    Two processes training the ConvNet of width 128 on 32 x 32 images in batches of 256 do 245 images a second at once
    and 420 in parts of 32. Running statistics want the batch whole, and so does a GPU.
    """
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    if first is None or first.weight.is_cuda or next(module.buffers(), None) is not None:
        return sys.maxsize
    return max(1, CACHE_ACTIVATIONS // (first.out_channels * pixels))


def gsam_gradient(
    slopes: Callable[[], tuple[Tensor, ...]], parameters: tuple[Tensor, ...], rho: float, alpha: float
) -> tuple[Tensor, ...]:
    """The gradient that leads to flat minima: GSAM (Zhuang et al., 2022) on ASAM's ellipsoid (Kwon et al., 2021).

    slopes: the gradient where the parameters are. Climbs to p + rho p^2 g / |p g|, takes the gradient g' there, and
    subtracts alpha times what of g is at right angles to g'. So do FTD's and DATM's public codes; for alpha = 0 it is
    ASAM. The parameters are left as they were.
    """
    here = slopes()
    with torch.no_grad():
        before = [p.clone() for p in parameters]
        length = sum((p * g).square().sum() for p, g in zip(parameters, here, strict=True)).sqrt()  # pyright: ignore
        for p, g in zip(parameters, here, strict=True):
            p.add_(p.square() * g * (rho / (length + 1e-12)))
    above = slopes()
    with torch.no_grad():
        for p, b in zip(parameters, before, strict=True):
            p.copy_(b)
        inner = sum((g * a).sum() for g, a in zip(here, above, strict=True))
        share = inner / (sum(a.square().sum() for a in above) + 1e-12)
        return tuple(a - alpha * (g - share * a) for g, a in zip(here, above, strict=True))


def _scale_to_mean_one(weights: Tensor, count: int) -> Tensor:
    """Weights float32 [N] with mean one; raises ValueError where they are none."""
    if weights.shape != (count,) or not weights.is_floating_point():
        raise ValueError(f"weights: {weights.dtype} {list(weights.shape)}: expected floats [{count}], one per image")
    if not (weights.isfinite().all() and (weights >= 0).all() and weights.any()):
        raise ValueError("weights: expected finite values from 0 up, not all of them 0")
    return weights.float() / weights.double().mean()


def batches(
    images: Images, order: Tensor, drawn: augment.Draw, batch: int, values: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The places (int64 [B], on the device) and augmented images of each batch of one epoch, in the given order.

    drawn: the augmentation of each image of `order`; values: of one image. Small ones are augmented many at a time.
    """
    piece = batch * max(1, DRAW_CHUNK // (batch * values))
    for start in range(0, len(order), piece):
        index = order[start : start + piece]
        x = augment.apply(images[index].to(device), drawn.rows(start, start + len(index)))
        yield from zip(index.to(device).split(batch), x.split(batch), strict=True)


def epochs(
    images: Images, recipe: Recipe, seed: int, device: torch.device
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """`batches` of every epoch. All draws come from (seed, epoch); those of short epochs are made many at a time.

    Always whole groups of epochs, also at the end: so an epoch's bits do not depend on how many follow.
    """
    count, first = len(images), images[torch.zeros(1, dtype=torch.int64)]
    values = first.numel()
    group = max(1, DRAW_CHUNK // (count * values))
    for start in range(0, recipe.epochs, group):
        generators = [seeds.generator(seed, "epoch", epoch) for epoch in range(start, start + group)]
        orders = [torch.randperm(count, generator=generator) for generator in generators]
        drawn = augment.draw(recipe.augment, count, first.shape[-1], *generators)
        for place, order in enumerate(orders[: recipe.epochs - start]):
            own = drawn.rows(place * count, (place + 1) * count)
            yield batches(images, order, own, recipe.batch, values, device)


def fit(
    module: nn.Module,
    images: Images,
    labels: Tensor,
    recipe: Recipe,
    seed: int,
    after_epoch: Callable[[int], None] | None = None,
    weights: Tensor | None = None,
) -> nn.Module:
    """Trains `module` in place on images [N, C, H, W] with labels int64 [N] or label logits [N, C]; returns it.

    weights: float [N], how much each image counts. They are scaled to mean one over all N, not within a batch: an
    image then counts the same whatever it is drawn with, and equal weights are no weights.
    Every draw comes from (seed, epoch): the result does not depend on what ran before.
    Raises ValueError on weights of another shape, negative, not finite or all zero.
    """
    device = next(module.parameters()).device
    target = (labels.softmax(1) if labels.is_floating_point() else labels).to(device)
    share = None if weights is None else _scale_to_mean_one(weights, len(images)).to(device)
    if device.type == "cuda":
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    predict, parameters = fused_forward(module.train()), tuple(module.parameters())
    velocity = tuple(map(torch.zeros_like, parameters))

    def slopes(x: Tensor, target: Tensor, share: Tensor | None) -> tuple[Tensor, ...]:
        piece = cache_batch_size(module, x[0, 0].numel())
        if len(x) <= piece:
            return summed_gradient([batch_loss(predict, x, target, share)], parameters)
        parts = x.split(piece), target.split(piece), repeat(None) if share is None else share.split(piece)
        losses = (batch_loss(predict, *part) * (len(part[0]) / len(x)) for part in zip(*parts, strict=False))
        return summed_gradient(losses, parameters)

    def step(x: Tensor, target: Tensor, share: Tensor | None, lr: float) -> None:
        here = partial(slopes, x, target, share)
        taken = gsam_gradient(here, parameters, recipe.rho, recipe.alpha) if recipe.rho else here()
        sgd_step(parameters, velocity, taken, lr, recipe.momentum, recipe.weight_decay)

    take = GraphedStep(step) if device.type == "cuda" else step
    for epoch, parts in enumerate(epochs(images, recipe, seed, device)):
        lr = recipe.lr * (0.1 if recipe.decay and epoch > recipe.epochs // 2 else 1.0)
        for index, x in parts:
            take(x, target[index], None if share is None else share[index], lr)
        if after_epoch:
            after_epoch(epoch)
    return module.eval()


@torch.no_grad()
def accuracy(module: nn.Module, images: Images, labels: Tensor, batch: int = 1024) -> float:
    """Share of images whose largest logit is the label's; a row that is not finite counts as wrong."""
    device, right = next(module.parameters()).device, 0
    predict = fused_forward(module.eval())
    batch = min(batch, cache_batch_size(module, images[torch.zeros(1, dtype=torch.int64)][0, 0].numel()))
    for start in range(0, len(images), batch):
        index = torch.arange(start, min(start + batch, len(images)))
        target = labels[index].to(device)
        right += int((per_sample(predict(images[index].to(device)), target).prediction == target).sum())
    return right / len(images)
