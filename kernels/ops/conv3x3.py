"""3 x 3 convolution with padding 1, by Winograd's F(2 x 2, 3 x 3), and both its gradients.

For each 4 x 4 tile d of a channel, the 2 x 2 output pixels of the tile are (Lavin and Gray, 2016)

    y = A^T [(G g G^T) * (B^T d B)] A,  with the sum over channels inside the brackets: 16 products instead of 36

These are 16 matrix products over tiles and channels. The gradient of the input is the same convolution with the kernel
rotated by 180 degrees. The gradient of the kernel is G^T [(B^T d B) * (A g_y A^T)] G, summed over the tiles. The error
is a few 1e-7 of the largest value. An infinity makes its whole tile NaN.

For first-order training only: a second derivative raises RuntimeError. Use torch.conv2d for anything that is
differentiated twice.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tadperf.kernels import native, registry
from tadperf.kernels.checks import check_dense, check_memory
from tadperf.kernels.dispatch import is_direct, record_call

registry.register("conv3x3", cuda="reference")  # torch.conv2d

MIN_TILES = 128  # tiles per partial sum of the kernel gradient; not tuned
# Partial sums of the kernel gradient, 16 matrices each. A power of two, so that threads share evenly; not tuned.
MAX_PARTS = 8
# In this range of channels it is faster than PyTorch's direct convolution (bench/results/ledger.md).
MIN_CHANNELS, MAX_CHANNELS = 32, 256


def covers(x: Tensor, channels_in: int, channels_out: int) -> bool:
    """Returns whether compiled code supports these maps: float32 on a CPU, 32 to 256 channels, in multiples of 16."""
    return is_direct(x) and _covers(x, channels_in, channels_out)


def _covers(x: Tensor, channels_in: int, channels_out: int) -> bool:
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and min(channels_in, channels_out) >= MIN_CHANNELS
        and max(channels_in, channels_out) <= MAX_CHANNELS
        and channels_in % 16 == channels_out % 16 == 0
        and native.available()
    )


def conv3x3(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolves x [N, C, H, W] with kernel [K, C, 3, 3] and padding 1; returns [N, K, H, W] (Lavin and Gray, 2016).

    float32 maps on a CPU with 32 to 256 channels, in multiples of 16, run compiled code. It gives the same bits for any
    number of threads. Its result is channels_last and can be differentiated once. All other maps run torch.conv2d.
    Raises ValueError for wrong shapes or types, and RuntimeError for a second derivative of compiled code.
    """
    _check(x, kernel, kernel.shape[1:2])
    compiled = _has_memory(x=x, kernel=kernel) and _covers(x, kernel.shape[1], kernel.shape[0])
    record_call("conv3x3", "cpu" if compiled else None)
    if not compiled:
        return torch.conv2d(x, kernel, padding=1)
    if torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad):
        return _Conv3x3.apply(x, kernel)
    return _forward(x, kernel)


def _has_memory(**tensors: Tensor) -> bool:
    """Returns whether compiled code may read the tensors. Raises ValueError if the storage of one was freed."""
    if not is_direct(*tensors.values()):
        return False
    check_memory(**tensors)  # plain PyTorch may crash on it, too
    return True


def _forward(x: Tensor, kernel: Tensor) -> Tensor:
    return _product(x, _transformed(kernel.detach(), rotated=False), len(kernel))


def _check(maps: Tensor, kernel: Tensor, channels: torch.Size) -> None:
    check_dense(maps=maps, kernel=kernel)
    fits = kernel.shape[2:] == (3, 3) and maps.ndim == 4 and maps.shape[1:2] == channels
    if kernel.device != maps.device:
        raise ValueError(f"kernel: on {kernel.device}: expected {maps.device}, like the maps")
    if not fits or kernel.dtype != maps.dtype or not maps.is_floating_point():
        raise ValueError(
            f"kernel: {kernel.dtype} {list(kernel.shape)}: does not fit maps {maps.dtype} {list(maps.shape)}; "
            "expected [K, C, 3, 3] of the same type"
        )


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        return _forward(x, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore
        # create_graph=True enables gradients here. once_differentiable would not raise if grad is a constant.
        if torch.is_grad_enabled():
            raise RuntimeError("conv3x3 has no second derivative: use torch.conv2d")
        x, kernel = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return conv3x3_input(grad, kernel) if needs[0] else None, conv3x3_kernel(grad, x) if needs[1] else None


def conv3x3_input(grad: Tensor, kernel: Tensor) -> Tensor:
    """Returns the gradient of x, given the gradient of y [N, K, H, W]. Raises ValueError for wrong shapes or types."""
    _check(grad, kernel, kernel.shape[:1])
    compiled = _has_memory(grad=grad, kernel=kernel) and _covers(grad, kernel.shape[1], kernel.shape[0])
    record_call("conv3x3_input", "cpu" if compiled else None)
    if not compiled:
        return _backward(grad, grad[:, :1].expand(-1, kernel.shape[1], -1, -1), kernel, 0)
    return _product(grad, _transformed(kernel.detach(), rotated=True), kernel.shape[1])


def conv3x3_kernel(grad: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient of the kernel [K, C, 3, 3], given the gradient of y [N, K, H, W].

    The bits are the same for any number of threads. Raises ValueError for wrong shapes or types.
    """
    check_dense(grad=grad, x=x)
    if x.ndim != 4 or grad.ndim != 4 or (len(x), *x.shape[2:]) != (len(grad), *grad.shape[2:]) or grad.dtype != x.dtype:
        raise ValueError(f"grad: {grad.dtype} {list(grad.shape)}: does not fit x, {x.dtype} {list(x.shape)}")
    if x.device != grad.device:
        raise ValueError(f"x: on {x.device}: expected {grad.device}, like grad")
    (images, channels, height, width), out = x.shape, grad.shape[1]
    compiled = _has_memory(grad=grad, x=x) and _covers(x, channels, out) and images > 0
    record_call("conv3x3_kernel", "cpu" if compiled else None)
    if not compiled:
        return _backward(grad, x, x.new_empty(out, channels, 3, 3), 1)
    tiles = images * -(-height // 2) * -(-width // 2)
    parts = 1 << max(0, min(MAX_PARTS, images, tiles // MIN_TILES).bit_length() - 1)
    partial = torch.empty((parts, 16, channels * out), dtype=torch.float32, device=x.device)
    native.call("conv3x3_kernel", _channels_last(grad), _channels_last(x), partial)
    taps = _kernel_transform(False).T @ (partial.sum(0) if parts > 1 else partial[0])
    return taps.view(3, 3, channels, out).permute(3, 2, 0, 1)


def _product(x: Tensor, transformed: Tensor, out: int) -> Tensor:
    images, _, height, width = x.shape
    shape = (images, out, height, width)
    y = torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
    native.call("conv3x3", _channels_last(x), transformed, y)
    return y


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _transformed(kernel: Tensor, rotated: bool) -> Tensor:
    """Returns G g G^T, [16, C K]. rotated: for the gradient of the input, [16, K C]."""
    taps = kernel.permute(2, 3, 0, 1) if rotated else kernel.permute(2, 3, 1, 0)
    return _kernel_transform(rotated) @ taps.reshape(9, -1)


@cache
def _kernel_transform(rotated: bool) -> Tensor:
    """Returns the Kronecker product of G and G, [16, 9]. rotated: for the 9 taps in reverse order."""
    rows = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]]
    with torch.inference_mode(False):  # the cache must not hold an inference tensor
        g = torch.tensor(rows, dtype=torch.float32, device="cpu")
        product = torch.kron(g, g)
        return product.flip(1).contiguous() if rotated else product


def _backward(grad: Tensor, x: Tensor, kernel: Tensor, which: int) -> Tensor:
    """Computes a gradient with PyTorch: that of the input if which is 0, that of the kernel if which is 1."""
    mask = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(grad, x, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)[
        which
    ]
