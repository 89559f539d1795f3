"""Instance norm, ReLU and 2 x 2 average pool with tangents, forward and backward: for second derivatives.

A tangent (marked ') is the derivative along one direction of the parameters. For each plane x (one channel of one
image, P pixels), with u = (x - mean) rstd, the weight w and bias b of the channel, and mean(.) over the pixels:

    y         pool of max(0, w u + b)
    y'        pool of w' u + w u' + b' if the pixel is positive, of 0 otherwise
    u'        rstd (x' - mean(x') - u s),     s = mean(u x')

For a positive pixel, let d be its share of the gradient g of y, and d' its share of the tangent g'. For other pixels
both are 0. The gradient of x, its tangent, and the tangents of the gradients of w and b are

    grad_x        rstd (w d - mean(w d) - u mean(w d u))                                        as in norm_relu_pool
    grad_x'       rstd (e - mean(e) - u mean(e u + w d u') - u' mean(w d u)) - rstd s grad_x,     e = w' d + w d'
    grad_w'       sum (d' u + d u')
    grad_b'       sum d'

These are the formulas that differentiating norm_relu_pool twice would give. Compiled code builds no graph, so no
gradient flows through it (tadperf).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.kernels import native, registry
from tadperf.kernels.checks import check_dense, check_like, check_memory
from tadperf.kernels.dispatch import is_direct

registry.register("norm_relu_pool_dual", cuda="reference")


class Dual(NamedTuple):
    """A value and its tangent, or a gradient and its tangent."""

    value: Tensor
    dot: Tensor


class Affine(NamedTuple):
    """The weight and bias [C] of instance norm, and their tangents."""

    weight: Tensor
    bias: Tensor
    weight_dot: Tensor
    bias_dot: Tensor


def norm_relu_pool_dual(x: Dual, affine: Affine, eps: float = 1e-5, pool: bool = True) -> tuple[Dual, Tensor]:
    """Returns y and y', and the moments [4, N, C] that the gradient needs (tadperf; formulas at the top of this file).

    x: float [N, C, H, W], value and tangent. Channels_last float32 maps run compiled code on a CPU, with the same bits
    for any number of threads. All other maps run plain PyTorch. Raises ValueError for wrong shapes, types or devices.
    """
    _check(x, affine, eps, pool)
    if not _compiled(x, affine):
        return norm_relu_pool_dual_reference(x, affine, eps, pool)
    _check_memory(x, affine)
    images, channels, height, width = x.value.shape
    window = 2 if pool else 1
    shape = (images, channels, height // window, width // window)
    y = Dual(*(_channels_last(shape) for _ in range(2)))
    moments = torch.empty((4, images, channels), dtype=torch.float32, device="cpu")
    native.call("norm_relu_pool_dual", *x, *_contiguous(affine), moments, *y, eps, pool)
    return y, moments


def norm_relu_pool_dual_gradient(
    grad: Dual, x: Dual, affine: Affine, moments: Tensor, pool: bool = True
) -> tuple[Dual, Tensor, Tensor]:
    """Returns grad_x and its tangent, and the tangents of the gradients of weight and bias [C].

    Raises ValueError for wrong shapes, types or devices.
    """
    _check(x, affine, 1, pool)
    _check_gradient(grad, x, moments, pool)
    if not _compiled(x, affine, *grad, moments):
        return norm_relu_pool_dual_gradient_reference(grad, x, affine, moments, pool)
    _check_memory(x, affine)
    check_memory(grad_value=grad.value, grad_dot=grad.dot, moments=moments)
    grad = Dual(*(g.contiguous(memory_format=torch.channels_last) for g in grad))
    grad_x = Dual(*map(torch.empty_like, x))
    affine = _contiguous(affine)
    grad_weight_dot, grad_bias_dot = torch.empty_like(affine.weight), torch.empty_like(affine.bias)
    results = *grad_x, grad_weight_dot, grad_bias_dot
    native.call("norm_relu_pool_dual_gradient", *grad, *x, *affine, moments.contiguous(), *results, pool)
    return grad_x, grad_weight_dot, grad_bias_dot


def norm_relu_pool_dual_reference(x: Dual, affine: Affine, eps: float = 1e-5, pool: bool = True) -> tuple[Dual, Tensor]:
    """Computes `norm_relu_pool_dual` in plain PyTorch, on any device and float type."""
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
    """Computes `norm_relu_pool_dual_gradient` in plain PyTorch, on any device and float type."""
    moments = moments[..., None, None]
    _, rstd, _, slope = moments
    u, u_dot, positive, (weight, _, weight_dot, _), _ = _parts(x, affine, moments)
    d, d_dot = (_unpooled(g, x.value, pool) * positive for g in grad)

    def mean(value: Tensor) -> Tensor:
        return value.mean((2, 3), keepdim=True)

    wd, e = weight * d, weight_dot * d + weight * d_dot
    along = mean(wd * u)
    grad_x = rstd * (wd - mean(wd) - u * along)
    grad_x_dot = rstd * (e - mean(e) - u * mean(e * u + wd * u_dot) - u_dot * along) - rstd * slope * grad_x
    return Dual(grad_x, grad_x_dot), (d_dot * u + d * u_dot).sum((0, 2, 3)), d_dot.sum((0, 2, 3))


def _parts(x: Dual, affine: Affine, moments: Tensor) -> tuple[Tensor, Tensor, Tensor, Affine, Tensor]:
    """Returns u, u', which pixels are positive, the weights and biases [C, 1, 1], and the input of ReLU."""
    mean, rstd, mean_dot, slope = moments
    by_channel = Affine(*(part[:, None, None] for part in affine))
    u = (x.value - mean) * rstd
    n = by_channel.weight * u + by_channel.bias
    return u, rstd * (x.dot - mean_dot - u * slope), n > 0, by_channel, n


def _unpooled(grad: Tensor, x: Tensor, pool: bool) -> Tensor:
    if not pool:
        return grad
    full = (grad / 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.pad(full, (0, x.shape[3] % 2, 0, x.shape[2] % 2)) if x.shape[2] % 2 or x.shape[3] % 2 else full


def _check(x: Dual, affine: Affine, eps: float, pool: bool) -> None:
    tensors = {"x.value": x.value, "x.dot": x.dot} | {f"affine.{name}": part for name, part in affine._asdict().items()}
    check_dense(**tensors)
    value, least = x.value, 2 if pool else 1
    if not value.is_floating_point() or value.ndim != 4 or value.shape[1] < 1 or min(value.shape[2:]) < least:
        raise ValueError(
            f"x.value: {value.dtype} {tuple(value.shape)}: expected floats [N, C, H, W], H and W of {least} or more"
        )
    check_like("x.dot", x.dot, value.shape, value.dtype, value.device)
    for name, part in affine._asdict().items():
        check_like(f"affine.{name}", part, value.shape[1:2], value.dtype, value.device)
    if not eps > 0:
        raise ValueError(f"eps: {eps}: expected more than 0")


def _check_gradient(grad: Dual, x: Dual, moments: Tensor, pool: bool) -> None:
    tensors = {"grad.value": grad.value, "grad.dot": grad.dot, "moments": moments}
    check_dense(**tensors)
    value, window = x.value, 2 if pool else 1
    images, channels, height, width = value.shape
    for name, part in (("grad.value", grad.value), ("grad.dot", grad.dot)):
        check_like(name, part, (images, channels, height // window, width // window), value.dtype, value.device)
    check_like("moments", moments, (4, images, channels), value.dtype, value.device)


def _check_memory(x: Dual, affine: Affine) -> None:
    check_memory(x_value=x.value, x_dot=x.dot, **affine._asdict())


def _compiled(x: Dual, affine: Affine, *others: Tensor) -> bool:
    return (
        is_direct(*x, *affine, *others)
        and native.available()
        and all(part.is_cpu and part.dtype == torch.float32 for part in x)
        and all(part.is_contiguous(memory_format=torch.channels_last) for part in x)
    )


def _contiguous(affine: Affine) -> Affine:
    return Affine(*(part.contiguous() for part in affine))


def _channels_last(shape: Iterable[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
