"""One training loop for experts, students and baselines."""

from __future__ import annotations

from collections.abc import Callable
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


class Recipe(NamedTuple):
    """How a network is trained: SGD, learning rate x 0.1 after half of the epochs where `decay` is set."""

    epochs: int
    batch: int
    lr: float
    momentum: float
    weight_decay: float
    augment: str
    decay: bool = True


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


def fit(
    module: nn.Module, images: Images, labels: Tensor, recipe: Recipe, seed: int,
    after_epoch: Callable[[int], None] | None = None,
) -> nn.Module:  # fmt: skip
    """Trains `module` in place on images [N, C, H, W] with labels int64 [N] or label logits [N, C]; returns it.

    Every draw comes from (seed, epoch): the result does not depend on what ran before.
    """
    count, device = len(images), next(module.parameters()).device
    target = labels.softmax(1) if labels.is_floating_point() else labels
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
            loss = F.cross_entropy(module(x), target[index].to(device))
            sgd(parameters, velocity, torch.autograd.grad(loss, parameters), lr, recipe.momentum, recipe.weight_decay)
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
