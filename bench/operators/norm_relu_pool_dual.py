"""Compares norm_relu_pool_dual with plain PyTorch, eager and compiled: `tadperf bench norm_relu_pool_dual`.

Measures the forward pass with tangents and its reverse together, as one inner step of matching runs them. The maps
[N, C, H, H] are those of the ConvNet of width 128 on 32 x 32 images in batches of 100, and of width 32 on digits in
batches of 64. They are contiguous: on CUDA both formats run Triton kernels, on a CPU only channels_last maps run
compiled code, so there the maps are copied first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.bench.operators.engine import Bench, Provider, Size
from tadperf.kernels import (
    Affine,
    Dual,
    norm_relu_pool_dual,
    norm_relu_pool_dual_gradient,
    norm_relu_pool_dual_gradient_reference,
    norm_relu_pool_dual_reference,
)

# A pixel that is 0 up to rounding passes the ReLU in one implementation and not in another, which changes its plane.
SLACK = 0.02

Forward = Callable[..., tuple[Dual, Tensor]]
Backward = Callable[..., tuple[Dual, Tensor, Tensor]]


class Step(NamedTuple):
    """The results of the forward pass and of its reverse."""

    y: Tensor
    y_dot: Tensor
    grad_x: Tensor
    grad_x_dot: Tensor
    grad_weight_dot: Tensor
    grad_bias_dot: Tensor


def inputs(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """Returns x, its tangent, weight, bias and their tangents, the gradient of y, and its tangent."""
    images, channels, height, width = size
    generator = torch.Generator(device).manual_seed(seed)
    pooled = images, channels, height // 2, width // 2
    maps = [torch.randn(shape, device=device, generator=generator).to(dtype) for shape in (size, size, pooled, pooled)]
    vectors = [torch.randn(channels, device=device, generator=generator) for _ in range(4)]
    return *maps[:2], *vectors, *maps[2:]


def moved(size: Size, dtype: torch.dtype) -> int:
    """Bytes: reads x twice and the gradient of y once, writes y and the gradient of x, each with its tangent."""
    images, channels, height, width = size
    return images * channels * (6 * height * width + 4 * (height // 2) * (width // 2)) * dtype.itemsize


def step(forward: Forward, backward: Backward) -> Callable[..., Step]:
    """Returns a function for both passes. Compiled code takes channels_last maps on a CPU."""

    def run(
        x: Tensor,
        x_dot: Tensor,
        weight: Tensor,
        bias: Tensor,
        weight_dot: Tensor,
        bias_dot: Tensor,
        grad: Tensor,
        grad_dot: Tensor,
    ) -> Step:
        maps, affine = Dual(x, x_dot), Affine(weight, bias, weight_dot, bias_dot)
        if x.is_cpu:
            maps = Dual(*(part.contiguous(memory_format=torch.channels_last) for part in maps))
        y, moments = forward(maps, affine)
        grad_x, grad_weight_dot, grad_bias_dot = backward(Dual(grad, grad_dot), maps, affine, moments)
        return Step(*y, *grad_x, grad_weight_dot, grad_bias_dot)

    return run


reference = step(norm_relu_pool_dual_reference, norm_relu_pool_dual_gradient_reference)
# float32; sums over a batch differ by their order
TOLERANCE: dict[str, tuple[float, float] | None] = {
    **dict.fromkeys(("y", "y_dot", "grad_x", "grad_x_dot"), (1e-3, 1e-3)),
    **dict.fromkeys(("grad_weight_dot", "grad_bias_dot"), (1e-3, 1e-2)),
}

BENCH = Bench(
    name="norm_relu_pool_dual",
    axes=("N", "C", "H", "W"),
    sizes={
        "cpu": ((100, 128, 16, 16), (100, 128, 8, 8), (64, 32, 8, 8), (64, 32, 4, 4)),
        "cuda": ((100, 128, 32, 32), (100, 128, 16, 16), (100, 128, 8, 8)),
    },
    inputs=inputs,
    moved=moved,
    reference=reference,
    providers={
        "tadperf": Provider("tadperf", lambda: step(norm_relu_pool_dual, norm_relu_pool_dual_gradient), slack=SLACK),
        "eager": Provider("eager", lambda: reference, slack=SLACK),
        "inductor": Provider("inductor", lambda: torch.compile(reference), slack=SLACK),
    },
    tolerance=TOLERANCE,
)
