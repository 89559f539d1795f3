"""Augmentations for the tests of differentiable_augment: those that DSA draws, and others."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tadperf.data import augment
from tadperf.kernels import differentiable_augment_reference

FULL = "color_crop_cutout_flip_scale_rotate"
STRATEGIES = (*augment.KINDS, "color_cutout", "flip_cutout", "color_rotate", FULL)

Arguments = tuple[Any, Any, Any, int]  # affine, color, hole, hole_side


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dot(first: Tensor, second: Tensor) -> float:
    return float((first.double() * second.double()).sum())


def hole_side(shape: tuple[int, ...]) -> int:
    return int(shape[2] * augment.CUTOUT + 0.5)


def dsa_parts(strategy: str, shape: tuple[int, ...], seed: int) -> Arguments:
    """Returns the arguments of a draw for images of this shape."""
    drawn = augment.draw(strategy, shape[0], max(shape[2:]), torch.Generator().manual_seed(seed))
    return drawn.affine, drawn.color, drawn.hole, hole_side(shape)


def free_parts(shape: tuple[int, ...], seed: int) -> Arguments:
    """Returns all kinds at once: maps with shear, strong zoom and far shifts, every third one singular."""
    generator = torch.Generator().manual_seed(seed)
    count = shape[0]
    scale = 4 ** (2 * torch.rand(count, 1, 1, generator=generator) - 1)
    affine = scale * (2 * torch.rand(count, 2, 3, generator=generator) - 1)
    affine[::3, 1, :2] = 2 * affine[::3, 0, :2]
    affine[::6, :, :2] = 0
    color = torch.rand(count, 3, generator=generator) * 2 - 0.5
    hole = torch.rand(count, 2, generator=generator) * max(shape[2:])
    hole[::2] = math.nan
    return affine, color, hole, hole_side(shape)


def without_brightness(arguments: Arguments) -> Arguments:
    affine, color, hole, side = arguments
    return affine, None if color is None else color * torch.tensor([0.0, 1.0, 1.0]), hole, side


def gradient_of_reference(shape: tuple[int, ...], arguments: Arguments, grad: Tensor) -> Tensor:
    """Returns the gradient of the images in float64, by autograd."""
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(differentiable_augment_reference(x, *arguments), x, grad.double())
    return gradient
