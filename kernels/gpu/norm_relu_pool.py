"""Triton twin of norm_relu_pool: each program takes PLANES whole planes, whose windows lie in chunks of BLOCK.

A window is what one pooled pixel is made of; along an odd side the last ones are cut short, count in the sums and are
not written. One chunk is read once and stays in registers; more chunks are read once for each of the sums.
"""

# Pyright takes a launch, kernel[grid](...), for a call of the function itself, which knows no num_warps, and
# some of Triton's functions for ones that never return.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.launch import launch


@triton.jit
def place(begin, part, height, width, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Row, column and whether there is such a pixel, of pixel `part` of the windows begin..begin + BLOCK."""
    across = (width + WINDOW - 1) // WINDOW
    window = begin + tl.arange(0, BLOCK)[None, :]
    row = window // across * WINDOW + part // WINDOW
    column = window % across * WINDOW + part % WINDOW
    return row, column, (row < height) & (column < width)


@triton.jit
def deviation(
    x, mean, inside, begin, part, height, width, x_step, BLOCK: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Pixels `part` less the mean, 0 where there is none; x points at the first pixel of each plane."""
    row, column, exists = place(begin, part, height, width, BLOCK, WINDOW)
    found = inside & exists
    at = x + (row * width + column).to(tl.int64) * x_step
    return tl.where(found, tl.load(at, found, other=0).to(tl.float32) - mean, 0.0)


@triton.jit
def pooled(begin, height, width, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Place of each window's pooled pixel, and whether it has one."""
    across = (width + WINDOW - 1) // WINDOW
    window = begin + tl.arange(0, BLOCK)[None, :]
    row, column = window // across, window % across
    return (row * (width // WINDOW) + column).to(tl.int64), (row < height // WINDOW) & (column < width // WINDOW)


@triton.jit
def planes_of(count, channels, PLANES: tl.constexpr):
    """The program's planes, whether there are such, and their channels."""
    plane = tl.program_id(0).to(tl.int64) * PLANES + tl.arange(0, PLANES)[:, None].to(tl.int64)
    return plane, plane < count, plane % channels


@triton.jit
def first_of(plane, channels, size, LAST: tl.constexpr):
    """First element of each plane of `size` pixels."""
    return plane // channels * channels * size + plane % channels if LAST else plane * size


@triton.jit
def forward_kernel(
    x, weight, bias, y, moments, count, channels, height, width, eps,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, WINDOW: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """y, and mean and rstd of PLANES planes a program; LAST: channels_last maps."""
    size = height * width
    plane, inside, channel = planes_of(count, channels, PLANES)
    step = channels if LAST else 1
    first = first_of(plane, channels, size, LAST)
    first_y = first_of(plane, channels, (height // WINDOW) * (width // WINDOW), LAST)
    sums = tl.zeros([PLANES, BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        for part in tl.static_range(WINDOW * WINDOW):
            sums += deviation(x + first, 0.0, inside, chunk * BLOCK, part, height, width, step, BLOCK, WINDOW)
    mean = tl.sum(sums, 1, keep_dims=True) / size
    left = tl.zeros([PLANES, BLOCK], tl.float32)
    squares = tl.zeros([PLANES, BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        for part in tl.static_range(WINDOW * WINDOW):
            d = deviation(x + first, mean, inside, chunk * BLOCK, part, height, width, step, BLOCK, WINDOW)
            left += d
            squares += d * d
    rest = tl.sum(left, 1, keep_dims=True) / size  # so that a constant plane has variance 0 exactly
    mean += rest
    variance = tl.sum(squares, 1, keep_dims=True) / size - rest * rest
    rstd = 1 / tl.sqrt(tl.where(variance < 0, 0.0, variance) + eps)
    tl.store(moments + plane, mean, inside)
    tl.store(moments + count + plane, rstd, inside)
    scale = rstd * tl.load(weight + channel, inside, other=0).to(tl.float32)
    shift = tl.load(bias + channel, inside, other=0).to(tl.float32)
    for chunk in range(CHUNKS):
        total = tl.zeros([PLANES, BLOCK], tl.float32)
        for part in tl.static_range(WINDOW * WINDOW):
            d = deviation(x + first, mean, inside, chunk * BLOCK, part, height, width, step, BLOCK, WINDOW)
            z = d * scale + shift
            total += tl.where(z <= 0, 0.0, z)  # keeps a NaN
        at, exists = pooled(chunk * BLOCK, height, width, BLOCK, WINDOW)
        value = total * (1.0 / (WINDOW * WINDOW))
        tl.store(y + first_y + at * step, value.to(y.dtype.element_ty), inside & exists)


@triton.jit
def backward_kernel(
    grad_y, x, weight, bias, moments, grad_x, shares, count, channels, height, width,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, WINDOW: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Of x, and each plane's share of the gradients of weight and bias, of PLANES planes a program."""
    size = height * width
    plane, inside, channel = planes_of(count, channels, PLANES)
    step = channels if LAST else 1
    first = first_of(plane, channels, size, LAST)
    first_y = first_of(plane, channels, (height // WINDOW) * (width // WINDOW), LAST)
    mean = tl.load(moments + plane, inside, other=0)
    rstd = tl.load(moments + count + plane, inside, other=0)
    scale = rstd * tl.load(weight + channel, inside, other=0).to(tl.float32)
    shift = tl.load(bias + channel, inside, other=0).to(tl.float32)
    sums = tl.zeros([PLANES, BLOCK], tl.float32)
    sums_d = tl.zeros([PLANES, BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        at, exists = pooled(chunk * BLOCK, height, width, BLOCK, WINDOW)
        g = tl.load(grad_y + first_y + at * step, inside & exists, other=0).to(tl.float32) * (1.0 / (WINDOW * WINDOW))
        for part in tl.static_range(WINDOW * WINDOW):
            d = deviation(x + first, mean, inside, chunk * BLOCK, part, height, width, step, BLOCK, WINDOW)
            passed = tl.where((d * scale + shift <= 0) | (exists == 0), 0.0, g)
            sums += passed
            sums_d += passed * d
    of_bias = tl.sum(sums, 1, keep_dims=True)
    of_weight = tl.sum(sums_d, 1, keep_dims=True) * rstd
    tl.store(shares + plane, of_weight, inside)
    tl.store(shares + count + plane, of_bias, inside)
    offset, slope = scale * of_bias / size, scale * rstd * of_weight / size
    for chunk in range(CHUNKS):
        at, exists = pooled(chunk * BLOCK, height, width, BLOCK, WINDOW)
        g = tl.load(grad_y + first_y + at * step, inside & exists, other=0).to(tl.float32) * (1.0 / (WINDOW * WINDOW))
        for part in tl.static_range(WINDOW * WINDOW):
            d = deviation(x + first, mean, inside, chunk * BLOCK, part, height, width, step, BLOCK, WINDOW)
            passed = tl.where((d * scale + shift <= 0) | (exists == 0), 0.0, g)
            row, column, here = place(chunk * BLOCK, part, height, width, BLOCK, WINDOW)
            to = grad_x + first + (row * width + column).to(tl.int64) * step
            value = scale * passed - offset - d * slope
            tl.store(to, value.to(grad_x.dtype.element_ty), inside & here)


def _launch(x: Tensor, pool: bool) -> tuple[tuple[int, ...], dict[str, int]]:
    """What every kernel takes after its tensors, and its constants: planes of a program, windows of a chunk."""
    images, channels, height, width = x.shape
    side = 2 if pool else 1
    windows = triton.cdiv(height, side) * triton.cdiv(width, side)
    last = not x.is_contiguous()
    how = launch("norm_relu_pool_channels_last" if last else "norm_relu_pool", x.device, windows)
    block = min(how["block"], max(4, triton.next_power_of_2(windows)))
    constants = {
        "PLANES": max(1, how["tile"] // block), "BLOCK": block, "CHUNKS": triton.cdiv(windows, block),
        "WINDOW": side, "LAST": last, "num_warps": how["num_warps"],
    }  # fmt: skip
    return (images * channels, channels, height, width), constants


def norm_relu_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> tuple[Tensor, Tensor]:
    """y and moments as tadperf.kernels.norm_relu_pool._forward gives them; x contiguous or channels_last."""
    sizes, constants = _launch(x, pool)
    side = constants["WINDOW"]
    wanted = torch.channels_last if constants["LAST"] else torch.contiguous_format
    shape = (*x.shape[:2], x.shape[2] // side, x.shape[3] // side)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=wanted)
    moments = torch.empty((2, *x.shape[:2]), dtype=torch.float32, device=x.device)
    if len(x):
        grid = (triton.cdiv(sizes[0], constants["PLANES"]),)
        with torch.cuda.device_of(x):
            forward_kernel[grid](x, weight.contiguous(), bias.contiguous(), y, moments, *sizes, eps, **constants)
    return y, moments


def norm_relu_pool_gradient(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; shares of the planes are summed over the images without atomics."""
    sizes, constants = _launch(x, pool)
    grad_x, shares = torch.empty_like(x), torch.empty_like(moments)
    if len(x):
        grid = (triton.cdiv(sizes[0], constants["PLANES"]),)
        scale, shift = weight.contiguous(), bias.contiguous()
        with torch.cuda.device_of(x):
            backward_kernel[grid](grad_y, x, scale, shift, moments, grad_x, shares, *sizes, **constants)
    return grad_x, shares[0].sum(0).to(weight.dtype), shares[1].sum(0).to(bias.dtype)
