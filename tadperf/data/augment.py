"""Differentiable Siamese augmentation (DSA): a draw can be applied again with the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.compute.transfer import upload
from tadperf.errors import UserError
from tadperf.kernels import differentiable_augment, differentiable_augment_adjoint
from tadperf.kernels.ops.differentiable_augment import is_fused

# The strengths in the public code of DSA (Zhao and Bilen, 2021).
CROP = 0.125  # largest shift, as a share of the side
CUTOUT = 0.5  # side of the hole, as a share of the image's side
SCALE = 1.2  # largest zoom; the smallest is 1 / SCALE
ROTATE = 15.0  # largest rotation to either side, degrees
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5

KINDS = ("color", "crop", "cutout", "flip", "scale", "rotate")


class Draw(NamedTuple):
    """The random values of one augmentation of B images. Applying them twice gives the same bits.

    affine: [B, 2, 3], maps output coordinates to input coordinates.
    color: [B, 3], brightness, saturation and contrast.
    hole: [B, 2], centre of the cutout in pixels; NaN for no cutout.
    A field is None if the strategy never uses it.
    """

    affine: Tensor | None
    color: Tensor | None
    hole: Tensor | None

    def rows(self, start: int, stop: int) -> Draw:
        """Returns the draw of images start to stop - 1."""
        return Draw(*(None if field is None else field[start:stop] for field in self))

    def to(self, device: torch.device) -> Draw:
        """Returns the draw on a device. To CUDA its fields travel in one copy, and the CPU does not wait for it."""
        return upload(self, device)


def parse(strategy: str) -> tuple[str, ...]:
    """Splits a strategy such as "color_crop_flip" into its kinds. Raises UserError on an unknown kind."""
    if strategy == "none":
        return ()
    kinds = tuple(strategy.split("_"))
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(
                "data.augment", strategy, f"{kind!r} is unknown; join any of {', '.join(KINDS)} with '_', or use 'none'"
            )
    return kinds


def draw(strategy: str, count: int, size: int, *generators: torch.Generator) -> Draw:
    """Draws one augmentation per image: one of the strategy's kinds, at a random strength (DSA).

    DSA's code draws one kind for a whole batch. One kind per image has the same marginal distribution, mixes the kinds
    within a batch, and makes the transform a static function of tensors (tadperf).
    size: the side of the images in pixels.
    generators: each draws for `count` images, so one call can serve many short epochs.
    """
    kinds = parse(strategy)
    if not kinds:
        return Draw(None, None, None)
    # Draws every strength, used or not, so that the number of draws does not depend on the strategy.
    drawn = [(torch.randint(len(kinds), (count,), generator=g), torch.rand(count, 4, generator=g)) for g in generators]
    kind_index, u = (torch.cat(part) for part in zip(*drawn, strict=True))
    count = len(kind_index)

    def uses(kind: str) -> Tensor:
        return kind_index == kinds.index(kind) if kind in kinds else torch.zeros(count, dtype=torch.bool)

    affine = color = hole = None
    if {"crop", "flip", "scale", "rotate"} & set(kinds):
        affine = torch.eye(2, 3).repeat(count, 1, 1)
        zoom = torch.where(uses("scale")[:, None], 1 / SCALE + u[:, :2] * (SCALE - 1 / SCALE), 1.0)
        angle = torch.where(uses("rotate"), (u[:, 0] - 0.5) * 2 * math.radians(ROTATE), 0.0)
        affine[:, 0, 0], affine[:, 0, 1] = zoom[:, 0] * angle.cos(), -angle.sin()
        affine[:, 1, 0], affine[:, 1, 1] = angle.sin(), zoom[:, 1] * angle.cos()
        affine[:, 0, 0] *= torch.where(uses("flip") & (u[:, 0] < 0.5), -1.0, 1.0)
        reach = int(size * CROP + 0.5)  # whole pixels; the border becomes 0
        shift = ((u[:, :2] * (2 * reach + 1)).floor() - reach) * (2 / size)
        affine[:, :, 2] = torch.where(uses("crop")[:, None], shift, 0.0)
    if "color" in kinds:
        identity = torch.tensor([0.0, 1.0, 1.0])
        strength = torch.stack([(u[:, 0] - 0.5) * BRIGHTNESS, u[:, 1] * SATURATION, u[:, 2] + CONTRAST], 1)
        color = torch.where(uses("color")[:, None], strength, identity)
    if "cutout" in kinds:
        hole = torch.where(uses("cutout")[:, None], (u[:, :2] * (size + 1)).floor(), math.nan)
    return Draw(affine, color, hole)


def apply(x: Tensor, drawn: Draw) -> Tensor:
    """Applies a drawn augmentation to images [B, C, H, W]. Differentiable in `x`."""
    return differentiable_augment(x, *drawn.to(x.device), _hole_side(x))


def apply_with_adjoint(x: Tensor, drawn: Draw) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns `apply(x, drawn)` without a graph, and the function from its gradient to the gradient of x.

    The function may be called once. On CUDA it runs the adjoint operator, elsewhere autograd.
    """
    x, drawn = x.detach(), drawn.to(x.device)
    if is_fused(x, *drawn):
        return apply(x, drawn), lambda grad: differentiable_augment_adjoint(grad, *drawn, _hole_side(x))
    x.requires_grad_()
    result = apply(x, drawn)
    return result.detach(), lambda grad: torch.autograd.grad(result, x, grad)[0]


def _hole_side(x: Tensor) -> int:
    return int(x.shape[2] * CUTOUT + 0.5)
