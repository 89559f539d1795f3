"""Training as the published codes write it: one network, one batch after another, augmented when it is drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf.data import augment
from tadperf.nets.training import Recipe


def fit(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    seed: int,
    after_epoch: Callable[[int], object] = lambda _: None,
) -> nn.Module:
    """The plain PyTorch loop, on all cores as threads; arguments as for `tadperf.training.fit`."""
    generator = torch.Generator().manual_seed(seed)
    target = labels.softmax(1) if labels.is_floating_point() else labels
    optimiser = torch.optim.SGD(module.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    module.train()
    for epoch in range(recipe.epochs):
        if recipe.decay and epoch == recipe.epochs // 2 + 1:
            optimiser.param_groups[0]["lr"] *= 0.1
        for index in torch.randperm(len(images), generator=generator).split(recipe.batch):
            drawn = augment.draw(recipe.augment, len(index), images.shape[-1], generator)
            index = index.to(images.device)
            loss = F.cross_entropy(module(augment.apply(images[index], drawn)), target[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        after_epoch(epoch)
    return module.eval()


@torch.no_grad()
def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that are classified rightly."""
    right = [(module(x).argmax(1) == y).sum() for x, y in zip(images.split(1024), labels.split(1024), strict=True)]
    return float(torch.stack(right).sum()) / len(images)
