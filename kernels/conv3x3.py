"""3 x 3 convolution, padded to the same size, by Winograd's F(2 x 2, 3 x 3), and both its gradients.

Of each 4 x 4 tile d of a channel, and the 2 x 2 pixels of y that see it (Lavin and Gray, 2016):

    y = A^T [(G g G^T) * (B^T d B)] A,  summed over the channels between the brackets: 16 products for 36

so the products are 16 matrix products over tiles and channels. The input's gradient is the same convolution with the
kernel turned round; the kernel's is G^T [(B^T d B) * (A g_y A^T)] G, summed over the tiles. Its error is a few 1e-7 of
the largest value. An infinity makes the whole tile NaN. First-order training alone: there is no second derivative, and
asking for one raises; what is differentiated twice takes torch.conv2d.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tadperf.kernels import native

TILES = 128  # at least so many to a part of the kernel's gradient
PARTS = 8  # at most: each holds 16 matrices. A power of two, for the threads' sake
LEAST, MOST = 32, 256  # channels between which it is faster than PyTorch's direct convolution (bench/results/ledger.md)


def covers(x: Tensor, channels_in: int, channels_out: int) -> bool:
    """Whether compiled code takes these maps: float32 on a CPU, channels in sixteens, not too few or many."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and x.dtype == torch.float32
        and min(channels_in, channels_out) >= LEAST
        and max(channels_in, channels_out) <= MOST
        and channels_in % 16 == channels_out % 16 == 0
        and native.available()
    )


def conv3x3(x: Tensor, kernel: Tensor) -> Tensor:
    """x [N, C, H, W] convolved with kernel [K, C, 3, 3], padded by one: [N, K, H, W] in channels_last (tadperf).

    float32 on a CPU, with 32 to 256 channels in sixteens, runs compiled code, with the same bits for any number of
    threads, and is once differentiable; the rest is torch.conv2d. Raises ValueError for shapes or types that do not
    fit, RuntimeError where a second derivative of compiled code is asked for.
    """
    _check(x, kernel, kernel.shape[1:2])
    if not covers(x, kernel.shape[1], kernel.shape[0]):
        return torch.conv2d(x, kernel, padding=1)
    if torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad):
        return _Conv3x3.apply(x, kernel)  # pyright: ignore[reportReturnType]
    return _product(x, _transformed(kernel, turned=False), len(kernel))


def _check(maps: Tensor, kernel: Tensor, channels: torch.Size) -> None:
    fits = kernel.shape[2:] == (3, 3) and maps.ndim == 4 and maps.shape[1:2] == channels
    if not fits or kernel.dtype != maps.dtype:
        raise ValueError(f"kernel: {kernel.dtype} {list(kernel.shape)}: does not fit {maps.dtype} {list(maps.shape)}")


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        return _product(x, _transformed(kernel, turned=False), len(kernel))

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # by create_graph; once_differentiable would let a constant grad through
            raise RuntimeError("conv3x3 has no second derivative: take torch.conv2d")
        x, kernel = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return conv3x3_input(grad, kernel) if wanted[0] else None, conv3x3_kernel(grad, x) if wanted[1] else None


def conv3x3_input(grad: Tensor, kernel: Tensor) -> Tensor:
    """The gradient of x, from that of y [N, K, H, W]. Raises ValueError for shapes or types that do not fit."""
    _check(grad, kernel, kernel.shape[:1])
    if not covers(grad, kernel.shape[1], kernel.shape[0]):
        return _backward(grad, grad[:, :1].expand(-1, kernel.shape[1], -1, -1), kernel, 0)
    return _product(grad, _transformed(kernel, turned=True), kernel.shape[1])


def conv3x3_kernel(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of the kernel [K, C, 3, 3], from that of y [N, K, H, W]; the same bits for any number of threads.

    Raises ValueError for shapes or types that do not fit.
    """
    if x.ndim != 4 or grad.ndim != 4 or (len(x), *x.shape[2:]) != (len(grad), *grad.shape[2:]) or grad.dtype != x.dtype:
        raise ValueError(f"grad: {grad.dtype} {list(grad.shape)}: does not fit x, {x.dtype} {list(x.shape)}")
    (images, channels, height, width), out = x.shape, grad.shape[1]
    if not covers(x, channels, out) or not images:
        return _backward(grad, x, x.new_empty(out, channels, 3, 3), 1)
    x, grad = (part.contiguous(memory_format=torch.channels_last) for part in (x, grad))
    shares = min(PARTS, images, images * -(-height // 2) * -(-width // 2) // TILES)
    parts = 1 << max(0, shares.bit_length() - 1)
    of_u = torch.empty(parts, 16, channels * out)
    module = native.module()
    assert module is not None
    module.conv3x3_kernel(
        x.data_ptr(), images, height, width, channels, out, grad.data_ptr(), of_u.data_ptr(), parts,
        native.isa_index(), torch.get_num_threads(),
    )  # fmt: skip
    taps = _corners(False).T @ (of_u.sum(0) if parts > 1 else of_u[0])
    return taps.view(3, 3, channels, out).permute(3, 2, 0, 1)


def _product(x: Tensor, u: Tensor, out: int) -> Tensor:
    images, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty((images, out, height, width), memory_format=torch.channels_last)
    module = native.module()
    assert module is not None
    module.conv3x3(
        x.data_ptr(), images, height, width, channels, out, u.data_ptr(), y.data_ptr(), native.isa_index(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _transformed(kernel: Tensor, turned: bool) -> Tensor:
    """G g G^T [16, C, K]; turned, of the kernel that takes gradients back, [16, K, C]."""
    taps = kernel.permute(2, 3, 0, 1) if turned else kernel.permute(2, 3, 1, 0)
    return _corners(turned) @ taps.reshape(9, -1)


@cache
def _corners(turned: bool) -> Tensor:
    """G x G [16, 9], by taps in their order or turned by half a turn."""
    g = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]])
    both = torch.kron(g, g)
    return both.flip(1).contiguous() if turned else both


def _backward(grad: Tensor, x: Tensor, kernel: Tensor, wanted: int) -> Tensor:
    mask = [wanted == 0, wanted == 1, False]
    return torch.ops.aten.convolution_backward(
        grad, x, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
    )[wanted]  # fmt: skip
