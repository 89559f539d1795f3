"""Compares norm_relu_pool with PyTorch's three layers, eager and compiled: `tadperf bench norm_relu_pool`.

Measures forward and backward together on contiguous maps [N, C, H, H]: those of the ConvNet of width 128 on 32 x 32
images in batches of 256, and of width 32 on digits in batches of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.bench.operators.engine import Bench, Provider, Size
from tadperf.kernels import norm_relu_pool, norm_relu_pool_reference

# A pixel that is 0 up to rounding passes the ReLU in one implementation and not in another. This changes the gradient
# of its plane (1 of 32 768 in the first size) and of its channel's weight (2 of 128 in ours, 1 in torch.compile's).
SLACK = 0.02

Layers = Callable[[Tensor, Tensor, Tensor], Tensor]


class Step(NamedTuple):
    """The results of forward and backward."""

    y: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def inputs(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """Returns x, weight, bias and the gradient of y as ordinary tensors: backward cannot save inference tensors."""
    images, channels, height, width = size
    generator = torch.Generator(device).manual_seed(seed)
    shapes = size, (channels,), (channels,), (images, channels, height // 2, width // 2)
    with torch.inference_mode(False):
        x, weight, bias, grad_y = (torch.randn(s, device=device, generator=generator) for s in shapes)
        return x.to(dtype), weight, bias, grad_y.to(dtype)


def moved(size: Size, dtype: torch.dtype) -> int:
    """Bytes: reads x twice, writes its gradient; writes y, a quarter of x, and reads its gradient."""
    images, channels, height, width = size
    return images * channels * (3 * height * width + 2 * (height // 2) * (width // 2)) * dtype.itemsize


def step(layers: Layers) -> Callable[..., Any]:
    """Returns a function for forward and backward; inside torch.compile, which refuses autograd.grad, forward only."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor) -> Step | dict[str, Tensor]:
        if torch.compiler.is_compiling():
            return {"y": layers(x, weight, bias)}
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
            y = layers(*leaves)
            return Step(y.detach(), *torch.autograd.grad(y, leaves, grad_y))

    return run


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's layers one after another."""
    y = F.group_norm(x, x.shape[1], weight.to(x.dtype), bias.to(x.dtype)).relu()
    return F.avg_pool2d(y, 2)


def reference(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor) -> Step:
    return step(norm_relu_pool_reference)(x, weight, bias, grad_y)


BENCH = Bench(
    name="norm_relu_pool",
    axes=("N", "C", "H", "W"),
    sizes={
        "cpu": ((256, 128, 32, 32), (256, 128, 16, 16), (256, 128, 8, 8), (64, 32, 8, 8), (64, 32, 4, 4)),
        "cuda": ((256, 128, 32, 32), (256, 128, 16, 16), (256, 128, 8, 8)),
    },
    inputs=inputs,
    moved=moved,
    reference=reference,
    providers={
        "tadperf": Provider("tadperf", lambda: step(norm_relu_pool), slack=SLACK),
        "eager": Provider("eager", lambda: step(eager), slack=SLACK),
        "inductor": Provider("inductor", lambda: step(torch.compile(eager)), slack=SLACK),
    },
    # float32; sums over a batch differ by their order
    tolerance={"y": (1e-4, 1e-4), "grad_x": (1e-4, 1e-4), "grad_weight": (1e-3, 1e-2), "grad_bias": (1e-3, 1e-2)},
)
