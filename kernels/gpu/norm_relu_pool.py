"""`norm_relu_pool` in Triton: each program handles PLANES planes, in chunks of BLOCK windows.

A window holds the pixels of one pooled pixel. If a side is odd, the last windows are incomplete. Their pixels count in
the sums, but there is no pooled pixel. A single chunk is read once and stays in registers: the kernels store nothing
before their last read, so the compiler keeps what it has loaded. Several chunks are read once for each sum.
"""

# Pyright reads a launch, kernel[grid](...), as a call of the function itself, which has no num_warps. It also
# believes that some functions of Triton never return.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.gpu import on_device
from tadperf.kernels.gpu.launch_configs import launch_config


@triton.jit
def place(begin, part, height, width, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Returns row and column of pixel `part` of the windows begin..begin + BLOCK, and whether the pixel exists."""
    across = (width + WINDOW - 1) // WINDOW
    window = begin + tl.arange(0, BLOCK)[None, :]
    row = window // across * WINDOW + part // WINDOW
    column = window % across * WINDOW + part % WINDOW
    return row, column, (row < height) & (column < width)


@triton.jit
def deviation(x_ptrs, mean, inside, begin, part, height, width, x_stride, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Returns pixels `part` minus the mean, in its type, and 0 for pixels that do not exist.

    x_ptrs: the first pixel of each plane. mean: [PLANES, 1].
    """
    row, column, exists = place(begin, part, height, width, BLOCK, WINDOW)
    found = inside & exists
    at = x_ptrs + (row * width + column).to(tl.int64) * x_stride
    return tl.where(found, tl.load(at, found, other=0).to(mean.dtype) - mean, 0.0)


@triton.jit
def pooled(begin, height, width, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Returns the offset of the pooled pixel of each window, and whether it exists."""
    across = (width + WINDOW - 1) // WINDOW
    window = begin + tl.arange(0, BLOCK)[None, :]
    row, column = window // across, window % across
    return (row * (width // WINDOW) + column).to(tl.int64), (row < height // WINDOW) & (column < width // WINDOW)


@triton.jit
def planes_of(count, channels, PLANES: tl.constexpr):
    """Returns the planes of the program, whether they exist, and their channels."""
    plane = tl.program_id(0).to(tl.int64) * PLANES + tl.arange(0, PLANES)[:, None].to(tl.int64)
    return plane, plane < count, plane % channels


@triton.jit
def first_of(plane, channels, size, LAST: tl.constexpr):
    """Returns the offset of the first element of each plane of `size` pixels."""
    return plane // channels * channels * size + plane % channels if LAST else plane * size


@triton.jit
def store(to_ptrs, values, inside, begin, height, width, stride, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Writes the pixels of the windows begin..begin + BLOCK. to_ptrs: first pixel of each plane. values: by part."""
    for part in tl.static_range(WINDOW * WINDOW):
        row, column, exists = place(begin, part, height, width, BLOCK, WINDOW)
        to = to_ptrs + (row * width + column).to(tl.int64) * stride
        tl.store(to, values[part].to(to_ptrs.dtype.element_ty), inside & exists)


@triton.jit
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, moments_ptr, n_planes, n_channels, height, width, eps,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, WINDOW: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Writes y, and mean and rstd of PLANES planes per program. LAST: the maps are channels_last."""
    size = height * width
    plane, inside, channel = planes_of(n_planes, n_channels, PLANES)
    step = n_channels if LAST else 1
    first = first_of(plane, n_channels, size, LAST)
    first_y = first_of(plane, n_channels, (height // WINDOW) * (width // WINDOW), LAST)
    zero = tl.zeros([PLANES, 1], tl.float32)
    sums = tl.zeros([PLANES, BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        for part in tl.static_range(WINDOW * WINDOW):
            sums += deviation(x_ptr + first, zero, inside, chunk * BLOCK, part, height, width, step, BLOCK, WINDOW)
    mean = tl.sum(sums, 1, keep_dims=True) / size
    left = tl.zeros([PLANES, BLOCK], tl.float32)
    squares = tl.zeros([PLANES, BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        for part in tl.static_range(WINDOW * WINDOW):
            d = deviation(x_ptr + first, mean, inside, chunk * BLOCK, part, height, width, step, BLOCK, WINDOW)
            left += d
            squares += d * d
    rest = tl.sum(left, 1, keep_dims=True) / size  # so that the variance of a constant plane is exactly 0
    mean += rest
    variance = tl.sum(squares, 1, keep_dims=True) / size - rest * rest
    rstd = 1 / tl.sqrt(tl.where(variance < 0, 0.0, variance) + eps)
    scale = rstd * tl.load(weight_ptr + channel, inside, other=0).to(tl.float32)
    shift = tl.load(bias_ptr + channel, inside, other=0).to(tl.float32)
    for chunk in range(CHUNKS):
        total = tl.zeros([PLANES, BLOCK], tl.float32)
        for part in tl.static_range(WINDOW * WINDOW):
            d = deviation(x_ptr + first, mean, inside, chunk * BLOCK, part, height, width, step, BLOCK, WINDOW)
            z = d * scale + shift
            total += tl.where(z <= 0, 0.0, z)  # keeps a NaN
        at, exists = pooled(chunk * BLOCK, height, width, BLOCK, WINDOW)
        value = total * (1.0 / (WINDOW * WINDOW))
        tl.store(y_ptr + first_y + at * step, value.to(y_ptr.dtype.element_ty), inside & exists)
    tl.store(moments_ptr + plane, mean, inside)
    tl.store(moments_ptr + n_planes + plane, rstd, inside)


@triton.jit
def backward_kernel(
    grad_y_ptr, x_ptr, weight_ptr, bias_ptr, moments_ptr, grad_x_ptr, partial_ptr, n_planes, n_channels, height, width,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, WINDOW: tl.constexpr, LAST: tl.constexpr,
    GRAD_LAST: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of x, and each plane's share of the gradients of weight and bias, PLANES per program.

    GRAD_LAST: grad_y is channels_last.
    """
    size = height * width
    plane, inside, channel = planes_of(n_planes, n_channels, PLANES)
    step = n_channels if LAST else 1
    step_y = n_channels if GRAD_LAST else 1
    first = first_of(plane, n_channels, size, LAST)
    first_y = first_of(plane, n_channels, (height // WINDOW) * (width // WINDOW), GRAD_LAST)
    mean = tl.load(moments_ptr + plane, inside, other=0)
    rstd = tl.load(moments_ptr + n_planes + plane, inside, other=0)
    scale = rstd * tl.load(weight_ptr + channel, inside, other=0).to(tl.float32)
    shift = tl.load(bias_ptr + channel, inside, other=0).to(tl.float32)
    sums = tl.zeros([PLANES, BLOCK], tl.float32)
    sums_d = tl.zeros([PLANES, BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        at, exists = pooled(chunk * BLOCK, height, width, BLOCK, WINDOW)
        g = tl.load(grad_y_ptr + first_y + at * step_y, inside & exists, other=0).to(tl.float32)
        g *= 1.0 / (WINDOW * WINDOW)
        for part in tl.static_range(WINDOW * WINDOW):
            d = deviation(x_ptr + first, mean, inside, chunk * BLOCK, part, height, width, step, BLOCK, WINDOW)
            passed = tl.where((d * scale + shift <= 0) | (exists == 0), 0.0, g)
            sums += passed
            sums_d += passed * d
    grad_bias = tl.sum(sums, 1, keep_dims=True)
    grad_weight = tl.sum(sums_d, 1, keep_dims=True) * rstd
    offset, slope = scale * grad_bias / size, scale * rstd * grad_weight / size
    for chunk in range(CHUNKS):
        at, exists = pooled(chunk * BLOCK, height, width, BLOCK, WINDOW)
        g = tl.load(grad_y_ptr + first_y + at * step_y, inside & exists, other=0).to(tl.float32)
        g *= 1.0 / (WINDOW * WINDOW)
        values = ()
        for part in tl.static_range(WINDOW * WINDOW):
            d = deviation(x_ptr + first, mean, inside, chunk * BLOCK, part, height, width, step, BLOCK, WINDOW)
            passed = tl.where((d * scale + shift <= 0) | (exists == 0), 0.0, g)
            values += (scale * passed - offset - d * slope,)
        store(grad_x_ptr + first, values, inside, chunk * BLOCK, height, width, step, BLOCK, WINDOW)
    tl.store(partial_ptr + plane, grad_weight, inside)
    tl.store(partial_ptr + n_planes + plane, grad_bias, inside)


def launch(operator: str, x: Tensor, pool: bool) -> tuple[tuple[int, ...], dict[str, int]]:
    """Returns the sizes that a kernel takes after its tensors, and its compile-time constants.

    In launch_configs.json, the size is the number of pixels of a plane, `block` the pixels of a chunk, and `tile` the
    pixels of all planes of a chunk. float64 takes half as many planes, because its values take twice the registers.
    """
    images, channels, height, width = x.shape
    side = 2 if pool else 1
    windows = triton.cdiv(height, side) * triton.cdiv(width, side)
    last = is_channels_last(x)
    config = launch_config(f"{operator}_channels_last" if last else operator, x.device, windows * side**2)
    block = min(config["block"] // side**2, max(4, triton.next_power_of_2(windows)))
    tile = config["tile"] // side**2 // (2 if x.dtype == torch.float64 else 1)
    constants = {
        "PLANES": max(1, tile // block),
        "BLOCK": block,
        "CHUNKS": triton.cdiv(windows, block),
        "WINDOW": side,
        "LAST": last,
        "num_warps": config["num_warps"],
    }
    return (images * channels, channels, height, width), constants


def is_channels_last(x: Tensor) -> bool:
    """Returns whether a map, contiguous or channels_last, has only the format channels_last."""
    return not x.is_contiguous()


def norm_relu_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> tuple[Tensor, Tensor]:
    """Returns y and the moments, like `ops.norm_relu_pool._forward`. x must be contiguous or channels_last."""
    sizes, constants = launch("norm_relu_pool", x, pool)
    side = constants["WINDOW"]
    wanted = torch.channels_last if constants["LAST"] else torch.contiguous_format
    shape = (*x.shape[:2], x.shape[2] // side, x.shape[3] // side)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=wanted)
    moments = torch.empty((2, *x.shape[:2]), dtype=torch.float32, device=x.device)
    if len(x):
        grid = (triton.cdiv(sizes[0], constants["PLANES"]),)
        with on_device(x):
            forward_kernel[grid](x, weight.contiguous(), bias.contiguous(), y, moments, *sizes, eps, **constants)
    return y, moments


def norm_relu_pool_gradient(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight and bias. Sums the shares of the planes over the images without atomics.

    grad_y and x must be contiguous or channels_last; they need not have the same format.
    """
    sizes, constants = launch("norm_relu_pool", x, pool)
    grad_x, partial = torch.empty_like(x), torch.empty_like(moments)
    if len(x):
        grid = (triton.cdiv(sizes[0], constants["PLANES"]),)
        scale, shift, last = weight.contiguous(), bias.contiguous(), is_channels_last(grad_y)
        with on_device(x):
            backward_kernel[grid](
                grad_y, x, scale, shift, moments, grad_x, partial, *sizes, **constants, GRAD_LAST=last
            )
    grad_weight, grad_bias = partial.sum(1)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
