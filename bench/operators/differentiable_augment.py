"""Compares differentiable_augment and its adjoint with plain PyTorch: `tadperf bench differentiable_augment`.

Measures both together on images [N, C, H, W] with one of the six kinds of DSA per image. On a CPU the operator is plain
PyTorch, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tadperf.bench.operators.engine import Bench, Provider, Size
from tadperf.data import augment
from tadperf.kernels import (
    differentiable_augment,
    differentiable_augment_adjoint,
    differentiable_augment_adjoint_reference,
    differentiable_augment_reference,
)

STRATEGY = "_".join(augment.KINDS)
# Two results in float32 that differ in the last bit may become neighbours in bfloat16.
SLACK = 0.01

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x, affine, color, hole, gradient of the result


class Step(NamedTuple):
    """The augmented images, and the gradient of the images."""

    y: Tensor
    grad_x: Tensor


def inputs(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Returns ordinary tensors: backward cannot save inference tensors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):
        affine, color, hole = augment.draw(STRATEGY, size[0], max(size[2:]), generator)
        assert affine is not None
        assert color is not None
        assert hole is not None
        x, grad = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
        return x, affine.to(device), color.to(device), hole.to(device), grad


def moved(size: Size, dtype: torch.dtype) -> int:
    """Bytes: reads images and gradients, writes both results, and reads the 11 numbers of a draw twice."""
    images, channels, height, width = size
    return images * (4 * channels * height * width * dtype.itemsize + 2 * 11 * 4)


def tadperf(x: Tensor, affine: Tensor, color: Tensor, hole: Tensor, grad: Tensor) -> Step:
    parts = affine, color, hole, hole_side(x)
    return Step(differentiable_augment(x, *parts), differentiable_augment_adjoint(grad, *parts))


def reference(x: Tensor, affine: Tensor, color: Tensor, hole: Tensor, grad: Tensor) -> Step:
    parts = affine, color, hole, hole_side(x)
    return Step(differentiable_augment_reference(x, *parts), differentiable_augment_adjoint_reference(grad, *parts))


def by_autograd(forward: Callable[..., Tensor]) -> Callable[..., Any]:
    """Returns a function that applies `forward` and differentiates it, as DSA's code does."""

    def run(x: Tensor, affine: Tensor, color: Tensor, hole: Tensor, grad: Tensor) -> Step:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = forward(leaf, affine, color, hole, hole_side(x))
            return Step(y.detach(), *torch.autograd.grad(y, leaf, grad))

    return run


def hole_side(x: Tensor) -> int:
    return max(1, x.shape[2] // 2)


BENCH = Bench(
    name="differentiable_augment",
    axes=("N", "C", "H", "W"),
    sizes={
        "cpu": ((100, 3, 32, 32),),
        "cuda": ((100, 3, 32, 32), (256, 3, 32, 32), (1000, 3, 32, 32), (100, 3, 64, 64)),
    },
    inputs=inputs,
    moved=moved,
    reference=reference,
    providers={
        "tadperf": Provider("tadperf", lambda: tadperf, slack=SLACK),
        "eager": Provider("eager", lambda: by_autograd(differentiable_augment_reference), slack=SLACK),
        "inductor": Provider(
            "inductor", lambda: by_autograd(torch.compile(differentiable_augment_reference)), slack=SLACK
        ),
    },
    tolerance={"y": (1e-4, 1e-4), "grad_x": (1e-4, 1e-4)},  # float32; coordinates are rounded differently
)
