"""Training by the common protocol of RD3 (Zhong et al., 2026, arXiv 2509.19743), so that all sets are trained alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf import seeds
from tadperf.compute.work_progress import add_trained
from tadperf.nets.training import Recipe

# RD3: Adam, cosine learning rate, CutMix + random resized crop + flip; labels of one ResNet-18 in every epoch.
RD3_RECIPE = Recipe(epochs=400, batch=50, lr=1e-3, momentum=0.9, weight_decay=0.0, augment="rd3", decay=False)
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # torchvision's defaults; the summaries of RD3 give no others


def smoothed_cosine(epoch: int, epochs: int, zeta: float) -> float:
    """Returns the factor of the learning rate, (1 + cos(pi epoch / (zeta epochs))) / 2. With zeta 2 it ends at 1/2."""
    return 0.5 * (1 + math.cos(math.pi * epoch / (zeta * epochs)))


def smoothing(network: str) -> float:
    """Returns RD3's zeta: 1 for ResNet-18, 2 for other networks."""
    return 1.0 if network == "resnet18" else 2.0


def fit_rd3(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    recipe: Recipe,
    zeta: float,
    seed: int,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[int]:
    """Trains a network in place on images [N, C, H, W] of its device; yields the number of each finished epoch.

    labels: int64 [N]. teacher: labels every augmented batch by its probabilities (temperature 1: RD3's formula has no
    other); its cross-entropy has the gradient of the KL divergence. Without a teacher the labels are used, mixed as
    CutMix mixes the images. recipe: augment = "none" trains without augmentation. Every draw comes from (seed, epoch).
    """
    device = next(module.parameters()).device
    classes = F.one_hot(labels.to(device), num_classes).float()
    optimiser = torch.optim.Adam(module.parameters(), lr=recipe.lr)
    module.train()
    for epoch in range(recipe.epochs):
        generator = seeds.generator(seed, "rd3", epoch)
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * smoothed_cosine(epoch, recipe.epochs, zeta)
        for index in torch.randperm(len(images), generator=generator).split(recipe.batch):
            x, target = images[index.to(images.device)].to(device), classes[index.to(device)]
            if recipe.augment != "none":
                x, partner, share = cut_mix(resized_crop_flip(x, generator), generator)
                target = share * target + (1 - share) * target[partner]
            if teacher is not None:
                with torch.no_grad():
                    target = teacher(x).softmax(1)
            optimiser.zero_grad()
            F.cross_entropy(module(x), target).backward()
            optimiser.step()
            add_trained(len(x))
        yield epoch


def resized_crop_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Crops a random part of each image [B, C, H, W], resizes it to the whole image, and flips half of them."""
    count = len(x)
    area = torch.empty(count).uniform_(*CROP_AREA, generator=generator)
    ratio = torch.empty(count).uniform_(*map(math.log, CROP_RATIO), generator=generator).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top, flip = torch.rand(3, count, generator=generator)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = width * (1 - 2 * (flip < 0.5).float())
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (2 * left - 1) * (1 - width)
    theta[:, 1, 2] = (2 * top - 1) * (1 - height)
    grid = F.affine_grid(theta.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def cut_mix(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Pastes one random box of another image of the batch into each image [B, C, H, W] (Yun et al., 2019, alpha 1).

    Returns the images, the other image of each one, int64 [B], and the share of pixels that an image keeps.
    """
    height, width = x.shape[2:]
    partner = torch.randperm(len(x), generator=generator).to(x.device)
    kept, across, down = torch.rand(3, generator=generator).tolist()
    side = math.sqrt(1 - kept)
    left, right = (round(min(max(across + step * side / 2, 0), 1) * width) for step in (-1, 1))
    top, bottom = (round(min(max(down + step * side / 2, 0), 1) * height) for step in (-1, 1))
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[partner, :, top:bottom, left:right]
    return mixed, partner, 1 - (right - left) * (bottom - top) / (width * height)
