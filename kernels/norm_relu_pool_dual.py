"""Instance norm, ReLU and 2 x 2 average pool with their tangent, and the reverse of both: for second derivatives.

Along a direction of the parameters, x moves by x' and a channel's weight w and bias b by w' and b'. Of each plane x
(one channel of one image, P pixels), with u = (x - mean) rstd and mean(.) over its pixels:

    y, y'     the pools of max(0, w u + b) and, where that is positive, of w' u + w u' + b'
    u'        rstd (x' - mean(x') - u s),     s = mean(u x')

With d and d' a pixel's share of the gradient g of y and of its tangent g', where the pixel was positive, 0 elsewhere:

    of x      rstd (w d - mean(w d) - u mean(w d u))                                            (norm_relu_pool's)
    of x'     rstd (e - mean(e) - u mean(e u + w d u') - u' mean(w d u)) - rstd s (of x),     e = w' d + w d'
    of w'     sum (d' u + d u'),     of b'     sum d'                                           tangents of w's and b's

No graph is made and none is needed: these are the formulas that differentiating norm_relu_pool twice would give, and
nothing differentiates through them (tadperf).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.kernels import native


class Dual(NamedTuple):
    """A value and its tangent, or a gradient and its."""

    value: Tensor
    dot: Tensor


class Affine(NamedTuple):
    """weight and bias [C], and their tangents."""

    weight: Tensor
    bias: Tensor
    weight_dot: Tensor
    bias_dot: Tensor


def norm_relu_pool_dual(x: Dual, affine: Affine, eps: float = 1e-5, pool: bool = True) -> tuple[Dual, Tensor]:
    """y and y', and the moments [4, N, C] that the reverse needs (see this module's first lines).

    x: float [N, C, H, W], value and tangent alike. Channels_last float32 runs compiled code on a CPU, with the same
    bits for any number of threads; the rest runs plain PyTorch.
    """
    if not _compiled(x):
        return norm_relu_pool_dual_reference(x, affine, eps, pool)
    images, channels, height, width = x.value.shape
    parts = 2 if pool else 1
    size = (images, channels, height // parts, width // parts)
    y = Dual(*(torch.empty(size, memory_format=torch.channels_last) for _ in range(2)))
    moments = torch.empty(4, images, channels)
    module = native.module()
    assert module is not None
    module.norm_relu_pool_dual(
        *_addresses(*x), images, channels, height, width, pool, *_addresses(*affine, moments), eps, *_addresses(*y),
        native.isa_index(), torch.get_num_threads(),
    )  # fmt: skip
    return y, moments


def norm_relu_pool_dual_gradient(
    grad: Dual, x: Dual, affine: Affine, moments: Tensor, pool: bool = True
) -> tuple[Dual, Tensor, Tensor]:
    """Of x (gradient and tangent), and the tangents of weight's and bias's gradients [C]."""
    if not _compiled(x):
        return norm_relu_pool_dual_gradient_reference(grad, x, affine, moments, pool)
    grad = Dual(*(g.contiguous(memory_format=torch.channels_last) for g in grad))
    of_x = Dual(*map(torch.empty_like, x))
    of_weight, of_bias = torch.empty_like(affine.weight), torch.empty_like(affine.bias)
    module = native.module()
    assert module is not None
    module.norm_relu_pool_dual_gradient(
        *_addresses(*x), *x.value.shape, pool, *_addresses(*affine, moments, *grad, *of_x, of_weight, of_bias),
        native.isa_index(), torch.get_num_threads(),
    )  # fmt: skip
    return of_x, of_weight, of_bias


def norm_relu_pool_dual_reference(x: Dual, affine: Affine, eps: float = 1e-5, pool: bool = True) -> tuple[Dual, Tensor]:
    """`norm_relu_pool_dual` in plain PyTorch, on any device and float dtype."""
    variance, mean = torch.var_mean(x.value, (2, 3), correction=0, keepdim=True)
    mean_dot, rstd = x.dot.mean((2, 3), keepdim=True), (variance + eps).rsqrt()
    slope = ((x.value - mean) * x.dot).mean((2, 3), keepdim=True) * rstd
    moments = torch.stack([mean, rstd, mean_dot, slope])
    u, u_dot, positive, (weight, _, weight_dot, bias_dot), n = _parts(x, affine, moments)
    n_dot = (weight_dot * u + weight * u_dot + bias_dot) * positive
    y = Dual(n.relu(), n_dot)
    return Dual(*(F.avg_pool2d(part, 2) if pool else part for part in y)), moments[..., 0, 0]


def norm_relu_pool_dual_gradient_reference(
    grad: Dual, x: Dual, affine: Affine, moments: Tensor, pool: bool = True
) -> tuple[Dual, Tensor, Tensor]:
    """`norm_relu_pool_dual_gradient` in plain PyTorch."""
    moments = moments[..., None, None]
    _, rstd, _, slope = moments
    u, u_dot, positive, (weight, _, weight_dot, _), _ = _parts(x, affine, moments)
    d, d_dot = (_unpooled(g, x.value, pool) * positive for g in grad)

    def mean(value: Tensor) -> Tensor:
        return value.mean((2, 3), keepdim=True)

    wd, e = weight * d, weight_dot * d + weight * d_dot
    along = mean(wd * u)
    of_x = rstd * (wd - mean(wd) - u * along)
    of_x_dot = rstd * (e - mean(e) - u * mean(e * u + wd * u_dot) - u_dot * along) - rstd * slope * of_x
    return Dual(of_x, of_x_dot), (d_dot * u + d * u_dot).sum((0, 2, 3)), d_dot.sum((0, 2, 3))


def _parts(x: Dual, affine: Affine, moments: Tensor) -> tuple[Tensor, Tensor, Tensor, Affine, Tensor]:
    """u, u', which pixels were positive, weights and biases by channel, and what ReLU gets."""
    mean, rstd, mean_dot, slope = moments
    by_channel = Affine(*(part[:, None, None] for part in affine))
    u = (x.value - mean) * rstd
    n = by_channel.weight * u + by_channel.bias
    return u, rstd * (x.dot - mean_dot - u * slope), n > 0, by_channel, n


def _unpooled(grad: Tensor, x: Tensor, pool: bool) -> Tensor:
    if not pool:
        return grad
    wide = (grad / 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.pad(wide, (0, x.shape[3] % 2, 0, x.shape[2] % 2)) if x.shape[2] % 2 or x.shape[3] % 2 else wide


def _compiled(x: Dual) -> bool:
    return (
        not torch.compiler.is_compiling()
        and native.available()
        and all(part.is_cpu and part.dtype == torch.float32 for part in x)
        and all(part.is_contiguous(memory_format=torch.channels_last) for part in x)
    )


def _addresses(*tensors: Tensor) -> list[int]:
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    return [tensor.data_ptr() for tensor in tensors]
