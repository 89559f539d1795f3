"""Differentiable Siamese augmentation: drawn once, replayed exactly."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.errors import UserError

# Strengths of DSA (Zhao and Bilen, 2021), as its public code has them.
CROP = 0.125  # largest shift, share of the side
CUTOUT = 0.5  # side of the hole, share of the side
SCALE = 1.2  # largest zoom, in and out
ROTATE = 15.0  # degrees
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5

KINDS = ("color", "crop", "cutout", "flip", "scale", "rotate")


class Draw(NamedTuple):
    """One drawn augmentation of B images: plain tensors, so that applying it twice gives the same bits.

    affine [B, 2, 3] (output to input coordinates), color [B, 3] (brightness, saturation, contrast), hole [B, 2] (centre
    of the cutout in pixels; NaN for none). A field is None where the strategy never uses it.
    """

    affine: Tensor | None
    color: Tensor | None
    hole: Tensor | None

    def rows(self, start: int, stop: int) -> Draw:
        """The part of the draw that belongs to images start ... stop - 1."""
        return Draw(*(None if field is None else field[start:stop] for field in self))


def parse(strategy: str) -> tuple[str, ...]:
    """The kinds that a strategy such as "color_crop_flip" names; raises UserError on an unknown one."""
    if strategy == "none":
        return ()
    kinds = tuple(strategy.split("_"))
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(
                "data.augment", strategy, f"{kind!r} is unknown; join any of {', '.join(KINDS)} by '_', or 'none'"
            )
    return kinds


def draw(strategy: str, count: int, size: int, *generators: torch.Generator) -> Draw:
    """Draws one augmentation per image: each image gets one of the strategy's kinds, at a random strength (DSA).

    DSA's code draws one kind for a whole batch; one kind per image has the same marginal distribution, mixes kinds
    within a batch, and makes the transform one static function of tensors (tadperf). `size` is the side in pixels.
    With several generators, `count` images from each in turn: one call for many short epochs.
    """
    kinds = parse(strategy)
    if not kinds:
        return Draw(None, None, None)
    # Every strength, whether used or not: the stream's length is fixed.
    drawn = [(torch.randint(len(kinds), (count,), generator=g), torch.rand(count, 4, generator=g)) for g in generators]
    pick, u = (torch.cat(part) for part in zip(*drawn, strict=True))
    count = len(pick)

    def chosen(kind: str) -> Tensor:
        return pick == kinds.index(kind) if kind in kinds else torch.zeros(count, dtype=torch.bool)

    affine = color = hole = None
    if {"crop", "flip", "scale", "rotate"} & set(kinds):
        affine = torch.eye(2, 3).repeat(count, 1, 1)
        zoom = torch.where(chosen("scale")[:, None], 1 / SCALE + u[:, :2] * (SCALE - 1 / SCALE), 1.0)
        angle = torch.where(chosen("rotate"), (u[:, 0] - 0.5) * 2 * math.radians(ROTATE), 0.0)
        affine[:, 0, 0], affine[:, 0, 1] = zoom[:, 0] * angle.cos(), -angle.sin()
        affine[:, 1, 0], affine[:, 1, 1] = angle.sin(), zoom[:, 1] * angle.cos()
        affine[:, 0, 0] *= torch.where(chosen("flip") & (u[:, 0] < 0.5), -1.0, 1.0)
        reach = int(size * CROP + 0.5)  # whole pixels, edges filled with 0
        shift = ((u[:, :2] * (2 * reach + 1)).floor() - reach) * (2 / size)
        affine[:, :, 2] = torch.where(chosen("crop")[:, None], shift, 0.0)
    if "color" in kinds:
        identity = torch.tensor([0.0, 1.0, 1.0])
        strength = torch.stack([(u[:, 0] - 0.5) * BRIGHTNESS, u[:, 1] * SATURATION, u[:, 2] + CONTRAST], 1)
        color = torch.where(chosen("color")[:, None], strength, identity)
    if "cutout" in kinds:
        hole = torch.where(chosen("cutout")[:, None], (u[:, :2] * (size + 1)).floor(), math.nan)
    return Draw(affine, color, hole)


def apply(x: Tensor, drawn: Draw) -> Tensor:
    """The images [B, C, H, W] under a drawn augmentation, differentiable in `x`."""
    if drawn.color is not None:
        brightness, saturation, contrast = drawn.color.to(x)[:, :, None, None, None].unbind(1)
        x = x + brightness
        if x.shape[1] > 1:
            grey = x.mean(1, keepdim=True)
            x = grey + (x - grey) * saturation
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (x - mean) * contrast
    if drawn.affine is not None:
        grid = F.affine_grid(drawn.affine.to(x), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
    if drawn.hole is not None:
        height, width = x.shape[2:]
        side = int(height * CUTOUT + 0.5)
        row, column = drawn.hole.to(x.device)[:, :, None].unbind(1)  # [B, 1]
        rows = (torch.arange(height, device=x.device) - row + side // 2).floor_divide(side) == 0
        columns = (torch.arange(width, device=x.device) - column + side // 2).floor_divide(side) == 0
        x = x.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0.0)  # NaN equals nothing: no hole
    return x
