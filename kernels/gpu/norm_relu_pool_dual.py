"""`norm_relu_pool_dual` in Triton: the forward pass with tangents, and its reverse.

The programs, planes, chunks and windows are those of norm_relu_pool.py: here, too, a plane that fits into one chunk is
read once and stays in registers. The formulas and names are those of kernels/ops/norm_relu_pool_dual.py. Sums and
moments are float32, or float64 for float64 maps.

The functions take tuples. maps: pointers to the first pixel of each plane of x and x'. area: whether the planes exist,
height, width, and the distance of two pixels. moments: mean, rstd, mean of x', and s. affine: weight, bias, and the
tangent of the weight.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.gpu import on_device
from tadperf.kernels.gpu.norm_relu_pool import (
    deviation,
    first_of,
    is_channels_last,
    launch,
    planes_of,
    pooled,
    store,
)


@triton.jit
def deviations(maps, means, area, begin, part, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Returns pixels `part` of x and x' minus their means."""
    inside, height, width, step = area
    d = deviation(maps[0], means[0], inside, begin, part, height, width, step, BLOCK, WINDOW)
    d_dot = deviation(maps[1], means[1], inside, begin, part, height, width, step, BLOCK, WINDOW)
    return d, d_dot


@triton.jit
def dual_moments(
    maps,
    area,
    EPS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Returns the moments, each [PLANES, 1]. WIDE: the type of sums.

    Takes two passes. The second one takes differences from the first means and corrects them.
    """
    size = area[1] * area[2]
    zero = tl.zeros([PLANES, 1], WIDE)
    x_sum, x_dot_sum = tl.zeros([PLANES, BLOCK], WIDE), tl.zeros([PLANES, BLOCK], WIDE)
    for chunk in range(CHUNKS):
        for part in tl.static_range(WINDOW * WINDOW):
            x, x_dot = deviations(maps, (zero, zero), area, chunk * BLOCK, part, BLOCK, WINDOW)
            x_sum += x
            x_dot_sum += x_dot
    mean, mean_dot = tl.sum(x_sum, 1, keep_dims=True) / size, tl.sum(x_dot_sum, 1, keep_dims=True) / size
    d_sum, d_dot_sum = tl.zeros([PLANES, BLOCK], WIDE), tl.zeros([PLANES, BLOCK], WIDE)
    square_sum, product_sum = tl.zeros([PLANES, BLOCK], WIDE), tl.zeros([PLANES, BLOCK], WIDE)
    for chunk in range(CHUNKS):
        for part in tl.static_range(WINDOW * WINDOW):
            d, d_dot = deviations(maps, (mean, mean_dot), area, chunk * BLOCK, part, BLOCK, WINDOW)
            d_sum += d
            d_dot_sum += d_dot
            square_sum += d * d
            product_sum += d * d_dot
    rest = tl.sum(d_sum, 1, keep_dims=True) / size  # so that the variance of a constant plane is exactly 0
    rest_dot = tl.sum(d_dot_sum, 1, keep_dims=True) / size
    variance = tl.sum(square_sum, 1, keep_dims=True) / size - rest * rest
    rstd = 1 / tl.sqrt(tl.where(variance < 0, 0.0, variance) + EPS)
    slope = rstd * (tl.sum(product_sum, 1, keep_dims=True) / size - rest * rest_dot)
    return mean + rest, rstd, mean_dot + rest_dot, slope


@triton.jit
def normalised(maps, moments, area, begin, part, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Returns u and u' of pixels `part`."""
    mean, rstd, mean_dot, slope = moments
    d, d_dot = deviations(maps, (mean, mean_dot), area, begin, part, BLOCK, WINDOW)
    u = d * rstd
    return u, rstd * (d_dot - u * slope)


@triton.jit
def by_channel(ptr, channel, inside, WIDE: tl.constexpr):
    """Returns the value of each plane's channel, [PLANES, 1]."""
    return tl.load(ptr + channel, inside, other=0).to(WIDE)


@triton.jit
def dual_forward_kernel(
    x_ptr, x_dot_ptr, weight_ptr, bias_ptr, weight_dot_ptr, bias_dot_ptr, y_ptr, y_dot_ptr, moments_ptr,
    n_planes, n_channels, height, width, EPS: tl.constexpr,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, WINDOW: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Writes y, y' and the moments of PLANES planes per program. LAST: the maps are channels_last."""
    WIDE: tl.constexpr = moments_ptr.dtype.element_ty
    plane, inside, channel = planes_of(n_planes, n_channels, PLANES)
    step = n_channels if LAST else 1
    first = first_of(plane, n_channels, height * width, LAST)
    first_y = first_of(plane, n_channels, (height // WINDOW) * (width // WINDOW), LAST)
    maps, area = (x_ptr + first, x_dot_ptr + first), (inside, height, width, step)
    weight, bias = by_channel(weight_ptr, channel, inside, WIDE), by_channel(bias_ptr, channel, inside, WIDE)
    weight_dot = by_channel(weight_dot_ptr, channel, inside, WIDE)
    bias_dot = by_channel(bias_dot_ptr, channel, inside, WIDE)
    moments = dual_moments(maps, area, EPS, PLANES, BLOCK, CHUNKS, WINDOW, WIDE)
    for chunk in range(CHUNKS):
        total, total_dot = tl.zeros([PLANES, BLOCK], WIDE), tl.zeros([PLANES, BLOCK], WIDE)
        for part in tl.static_range(WINDOW * WINDOW):
            u, u_dot = normalised(maps, moments, area, chunk * BLOCK, part, BLOCK, WINDOW)
            n = weight * u + bias
            total += tl.where(n <= 0, 0.0, n)  # keeps a NaN
            total_dot += tl.where(n <= 0, 0.0, weight_dot * u + weight * u_dot + bias_dot)
        at, exists = pooled(chunk * BLOCK, height, width, BLOCK, WINDOW)
        to, share = first_y + at * step, 1.0 / (WINDOW * WINDOW)
        tl.store(y_ptr + to, (total * share).to(y_ptr.dtype.element_ty), inside & exists)
        tl.store(y_dot_ptr + to, (total_dot * share).to(y_ptr.dtype.element_ty), inside & exists)
    for i in tl.static_range(4):
        tl.store(moments_ptr + i * n_planes + plane, moments[i], inside)


@triton.jit
def shares(grads, area, begin, step, BLOCK: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr):
    """Returns the shares of each pixel in g and g', and whether the windows have a pooled pixel."""
    inside, height, width, _ = area
    at, exists = pooled(begin, height, width, BLOCK, WINDOW)
    g = tl.load(grads[0] + at * step, inside & exists, other=0).to(WIDE)
    g_dot = tl.load(grads[1] + at * step, inside & exists, other=0).to(WIDE)
    return g * (1.0 / (WINDOW * WINDOW)), g_dot * (1.0 / (WINDOW * WINDOW)), exists


@triton.jit
def passed(share, u, affine):
    """Returns d and d': the shares of positive pixels."""
    g, g_dot, exists = share
    off = (affine[0] * u + affine[1] <= 0) | (exists == 0)
    return tl.where(off, 0.0, g), tl.where(off, 0.0, g_dot)


@triton.jit
def dual_sums(
    maps,
    grads,
    moments,
    affine,
    area,
    step_y,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Returns the sums over the pixels of d, d u, d', and d' u + d u', each [PLANES, 1]."""
    d_sum, d_dot_sum = tl.zeros([PLANES, BLOCK], WIDE), tl.zeros([PLANES, BLOCK], WIDE)
    du_sum, du_dot_sum = tl.zeros([PLANES, BLOCK], WIDE), tl.zeros([PLANES, BLOCK], WIDE)
    for chunk in range(CHUNKS):
        share = shares(grads, area, chunk * BLOCK, step_y, BLOCK, WINDOW, WIDE)
        for part in tl.static_range(WINDOW * WINDOW):
            u, u_dot = normalised(maps, moments, area, chunk * BLOCK, part, BLOCK, WINDOW)
            d, d_dot = passed(share, u, affine)
            d_sum += d
            d_dot_sum += d_dot
            du_sum += d * u
            du_dot_sum += d_dot * u + d * u_dot
    grad_b, grad_b_dot = tl.sum(d_sum, 1, keep_dims=True), tl.sum(d_dot_sum, 1, keep_dims=True)
    grad_w, grad_w_dot = tl.sum(du_sum, 1, keep_dims=True), tl.sum(du_dot_sum, 1, keep_dims=True)
    return grad_b, grad_w, grad_b_dot, grad_w_dot


@triton.jit
def dual_backward_kernel(
    grad_ptr, grad_dot_ptr, x_ptr, x_dot_ptr, weight_ptr, bias_ptr, weight_dot_ptr, moments_ptr,
    grad_x_ptr, grad_x_dot_ptr, partial_ptr, n_planes, n_channels, height, width,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, WINDOW: tl.constexpr, LAST: tl.constexpr,
    GRAD_LAST: tl.constexpr,
):  # fmt: skip
    """Writes grad_x and grad_x', and each plane's share of grad_w' and grad_b', for PLANES planes per program.

    LAST: the maps are channels_last. GRAD_LAST: the gradients of y are channels_last.
    """
    WIDE: tl.constexpr = moments_ptr.dtype.element_ty
    size = height * width
    plane, inside, channel = planes_of(n_planes, n_channels, PLANES)
    step, step_y = n_channels if LAST else 1, n_channels if GRAD_LAST else 1
    first = first_of(plane, n_channels, size, LAST)
    first_y = first_of(plane, n_channels, (height // WINDOW) * (width // WINDOW), GRAD_LAST)
    maps, area = (x_ptr + first, x_dot_ptr + first), (inside, height, width, step)
    grads = (grad_ptr + first_y, grad_dot_ptr + first_y)
    weight, bias = by_channel(weight_ptr, channel, inside, WIDE), by_channel(bias_ptr, channel, inside, WIDE)
    weight_dot = by_channel(weight_dot_ptr, channel, inside, WIDE)
    affine, moments = (weight, bias, weight_dot), ()
    for i in tl.static_range(4):
        moments += (tl.load(moments_ptr + i * n_planes + plane, inside, other=0),)
    grad_b, grad_w, grad_b_dot, grad_w_dot = dual_sums(
        maps, grads, moments, affine, area, step_y, PLANES, BLOCK, CHUNKS, WINDOW, WIDE
    )
    # The means of w d and of w d u, and their tangents.
    m0, m0_dot = weight * grad_b / size, (weight_dot * grad_b + weight * grad_b_dot) / size
    m1, m1_dot = weight * grad_w / size, (weight_dot * grad_w + weight * grad_w_dot) / size
    for chunk in range(CHUNKS):
        share = shares(grads, area, chunk * BLOCK, step_y, BLOCK, WINDOW, WIDE)
        grad_x, grad_x_dot = (), ()
        for part in tl.static_range(WINDOW * WINDOW):
            u, u_dot = normalised(maps, moments, area, chunk * BLOCK, part, BLOCK, WINDOW)
            d, d_dot = passed(share, u, affine)
            value = moments[1] * (weight * d - m0 - u * m1)
            inner = weight_dot * d + weight * d_dot - m0_dot - u_dot * m1 - u * m1_dot
            grad_x += (value,)
            grad_x_dot += (moments[1] * (inner - moments[3] * value),)
        store(grad_x_ptr + first, grad_x, inside, chunk * BLOCK, height, width, step, BLOCK, WINDOW)
        store(grad_x_dot_ptr + first, grad_x_dot, inside, chunk * BLOCK, height, width, step, BLOCK, WINDOW)
    tl.store(partial_ptr + plane, grad_w_dot, inside)
    tl.store(partial_ptr + n_planes + plane, grad_b_dot, inside)


def norm_relu_pool_dual(
    x: tuple[Tensor, Tensor],
    affine: tuple[Tensor, Tensor, Tensor, Tensor],
    moments: Tensor,
    y: tuple[Tensor, Tensor],
    eps: float,
    pool: bool,
) -> None:
    """Fills y, y' and the moments [4, N, C]. All maps must have the same format, contiguous or channels_last."""
    sizes, constants = launch("norm_relu_pool_dual", x[0], pool)
    if len(x[0]):
        grid = (triton.cdiv(sizes[0], constants["PLANES"]),)
        with on_device(x[0]):
            dual_forward_kernel[grid](*x, *affine, *y, moments, *sizes, EPS=eps, **constants)


def norm_relu_pool_dual_gradient(
    grad: tuple[Tensor, Tensor],
    x: tuple[Tensor, Tensor],
    affine: tuple[Tensor, Tensor, Tensor, Tensor],
    moments: Tensor,
    grad_x: tuple[Tensor, Tensor],
    pool: bool,
) -> Tensor:
    """Fills grad_x and its tangent. Returns grad_w' and grad_b', [2, C]: sums over the images, without atomics.

    x and grad_x must have the same format. The two parts of grad must have the same format too.
    """
    sizes, constants = launch("norm_relu_pool_dual", x[0], pool)
    if not pool and x[0].element_size() == 2 and constants["num_warps"] == 16:
        # 16 warps leave 128 registers to a thread. With 8 planes of 32 x 32, sm_100 spilled 16 bytes of bfloat16.
        constants["PLANES"] = max(1, constants["PLANES"] // 2)
    partial = moments.new_empty((2, *moments.shape[1:]))
    if len(x[0]):
        grid = (triton.cdiv(sizes[0], constants["PLANES"]),)
        tensors = *grad, *x, *affine[:3], moments, *grad_x, partial
        with on_device(x[0]):
            dual_backward_kernel[grid](*tensors, *sizes, **constants, GRAD_LAST=is_channels_last(grad[0]))
    return partial.sum(1)
