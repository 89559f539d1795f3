"""One training loop for experts, students and baselines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf import seeds
from tadperf.data import augment
from tadperf.kernels import per_sample


class Images(Protocol):
    """Normalised images by index: a float tensor [N, C, H, W], or a view that normalises a batch on demand."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor, /) -> Tensor: ...


class Chosen:
    """Some of the images, by their places `index` (int64 [M]) among all: no pixel is copied."""

    def __init__(self, images: Images, index: Tensor) -> None:
        self.images, self.index = images, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.images[self.index[index]]


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
def sgd(
    parameters: tuple[Tensor, ...], velocity: tuple[Tensor, ...], gradients: tuple[Tensor, ...], lr: float,
    momentum: float, weight_decay: float,
) -> None:  # fmt: skip
    """One step of SGD in place, as torch.optim.SGD takes it.

    Not that class: the first optimiser of a process imports the compiler, 2 s in every worker of every pool.
    """
    for p, v, g in zip(parameters, velocity, gradients, strict=True):
        v.mul_(momentum).add_(g).add_(p, alpha=weight_decay)
        p.add_(v, alpha=-lr)


def batch_loss(module: nn.Module, x: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Mean cross-entropy of a batch x [B, C, H, W], each sample times its weight [B] where there are any."""
    if weights is None:
        return F.cross_entropy(module(x), target)
    return (weights * F.cross_entropy(module(x), target, reduction="none")).mean()


def flat_gradient(
    loss: Callable[[], Tensor], parameters: tuple[Tensor, ...], rho: float, alpha: float
) -> tuple[Tensor, ...]:
    """The gradient that leads to flat minima: GSAM (Zhuang et al., 2022) on ASAM's ellipsoid (Kwon et al., 2021).

    Climbs to p + rho p^2 g / |p g|, takes the gradient g' there, and subtracts alpha times what of g is at right angles
    to g'. So do FTD's and DATM's public codes; for alpha = 0 it is ASAM. The parameters are left as they were.
    """
    here = torch.autograd.grad(loss(), parameters)
    with torch.no_grad():
        before = [p.clone() for p in parameters]
        length = sum((p * g).square().sum() for p, g in zip(parameters, here, strict=True)).sqrt()  # pyright: ignore
        for p, g in zip(parameters, here, strict=True):
            p.add_(p.square() * g * (rho / (length + 1e-12)))
    above = torch.autograd.grad(loss(), parameters)
    with torch.no_grad():
        for p, b in zip(parameters, before, strict=True):
            p.copy_(b)
        inner = sum((g * a).sum() for g, a in zip(here, above, strict=True))
        share = inner / (sum(a.square().sum() for a in above) + 1e-12)
        return tuple(a - alpha * (g - share * a) for g, a in zip(here, above, strict=True))


def _mean_one(weights: Tensor, count: int) -> Tensor:
    """Weights float32 [N] with mean one; raises ValueError where they are none."""
    if weights.shape != (count,) or not weights.is_floating_point():
        raise ValueError(f"weights: {weights.dtype} {list(weights.shape)}: expected floats [{count}], one per image")
    if not (weights.isfinite().all() and (weights >= 0).all() and weights.any()):
        raise ValueError("weights: expected finite values from 0 up, not all of them 0")
    return weights.float() / weights.double().mean()


def fit(
    module: nn.Module, images: Images, labels: Tensor, recipe: Recipe, seed: int,
    after_epoch: Callable[[int], None] | None = None, weights: Tensor | None = None,
) -> nn.Module:  # fmt: skip
    """Trains `module` in place on images [N, C, H, W] with labels int64 [N] or label logits [N, C]; returns it.

    weights: float [N], how much each image counts. They are scaled to mean one over all N, not within a batch: an
    image then counts the same whatever it is drawn with, and equal weights are no weights.
    Every draw comes from (seed, epoch): the result does not depend on what ran before.
    Raises ValueError on weights of another shape, negative, not finite or all zero.
    """
    count, device = len(images), next(module.parameters()).device
    target = labels.softmax(1) if labels.is_floating_point() else labels
    share = None if weights is None else _mean_one(weights, count)
    size = images[torch.zeros(1, dtype=torch.int64)].shape[-1]
    parameters = tuple(module.parameters())
    velocity = tuple(map(torch.zeros_like, parameters))
    module.train()
    for epoch in range(recipe.epochs):
        lr = recipe.lr * (0.1 if recipe.decay and epoch > recipe.epochs // 2 else 1.0)
        generator = seeds.generator(seed, "epoch", epoch)
        order = torch.randperm(count, generator=generator)
        drawn = augment.draw(recipe.augment, count, size, generator)
        for start in range(0, count, recipe.batch):
            index = order[start : start + recipe.batch]
            x = augment.apply(images[index].to(device), drawn.rows(start, start + len(index)))
            own = None if share is None else share[index].to(device)
            loss = partial(batch_loss, module, x, target[index].to(device), own)
            if recipe.rho:
                gradient = flat_gradient(loss, parameters, recipe.rho, recipe.alpha)
            else:
                gradient = torch.autograd.grad(loss(), parameters)
            sgd(parameters, velocity, gradient, lr, recipe.momentum, recipe.weight_decay)
        if after_epoch:
            after_epoch(epoch)
    return module.eval()


@torch.no_grad()
def accuracy(module: nn.Module, images: Images, labels: Tensor, batch: int = 1024) -> float:
    """Share of images whose largest logit is the label's; a row that is not finite counts as wrong."""
    module.eval()
    device, right = next(module.parameters()).device, 0
    for start in range(0, len(images), batch):
        index = torch.arange(start, min(start + batch, len(images)))
        target = labels[index].to(device)
        right += int((per_sample(module(images[index].to(device)), target).prediction == target).sum())
    return right / len(images)
