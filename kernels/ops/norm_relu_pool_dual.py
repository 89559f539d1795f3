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

These are the formulas that differentiating norm_relu_pool twice would give (tadperf). Compiled code builds no graph, so
no gradient flows through it: do not use it inside a function that autograd differentiates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.kernels import gpu, native, registry
from tadperf.kernels.checks import check_dense, check_like, check_memory, describe
from tadperf.kernels.dispatch import is_direct, record_call
from tadperf.kernels.native import ELEMENT_TYPES
from tadperf.kernels.ops.norm_relu_pool import _accumulator, _format, _in_format, _pooled_shape

registry.register("norm_relu_pool_dual")


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

    x: float [N, C, H, W], value and tangent. Sums and moments are float32, or float64 for float64 maps. Channels_last
    float32 maps run compiled code on a CPU, with the same bits for any number of threads. On CUDA all float types run a
    Triton kernel. All else runs plain PyTorch. From compiled code, y and y' are the halves of one tensor, so that
    `join` costs nothing. Raises ValueError for wrong shapes, types or devices.
    """
    _check(x, affine, eps, pool)
    device = _compiled(x, affine)
    record_call("norm_relu_pool_dual", device)
    if device is None:
        return norm_relu_pool_dual_reference(x, affine, eps, pool)
    memory_format = torch.channels_last if device == "cpu" else _format(x.value)
    x, shape = _both(x, memory_format), _pooled_shape(x.value, pool)
    y = Dual(*_halves(shape, x.value, memory_format))
    moments = torch.empty((4, *shape[:2]), dtype=_accumulator(x.value), device=x.value.device)
    if device == "cuda":
        from tadperf.kernels.gpu import norm_relu_pool_dual as triton

        triton.norm_relu_pool_dual(x, _contiguous(affine), moments, y, eps, pool)
    else:
        native.call("norm_relu_pool_dual", *x, *_contiguous(affine), moments, *y, eps, pool)
    return y, moments


def norm_relu_pool_dual_gradient(
    grad: Dual, x: Dual, affine: Affine, moments: Tensor, pool: bool = True
) -> tuple[Dual, Tensor, Tensor]:
    """Returns grad_x and its tangent, and the tangents of the gradients of weight and bias [C].

    From compiled code, the tangent and the value of grad_x are the halves of one tensor, in this order. Raises
    ValueError for wrong shapes, types or devices.
    """
    _check(x, affine, 1, pool)
    _check_gradient(grad, x, moments, pool)
    device = _compiled(x, affine, grad_value=grad.value, grad_dot=grad.dot, moments=moments)
    record_call("norm_relu_pool_dual_gradient", device)
    if device is None:
        return norm_relu_pool_dual_gradient_reference(grad, x, affine, moments, pool)
    memory_format = torch.channels_last if device == "cpu" else _format(x.value)
    x, affine, moments = _both(x, memory_format), _contiguous(affine), moments.contiguous()
    dot, value = _halves(x.value.shape, x.value, memory_format)
    grad_x = Dual(value, dot)
    if device == "cuda":
        from tadperf.kernels.gpu import norm_relu_pool_dual as triton

        grad = _both(grad, _format(grad.value))
        grad_w_dot, grad_b_dot = triton.norm_relu_pool_dual_gradient(grad, x, affine, moments, grad_x, pool)
        return grad_x, grad_w_dot.to(affine.weight.dtype), grad_b_dot.to(affine.bias.dtype)
    grad = _both(grad, memory_format)
    grad_w_dot, grad_b_dot = torch.empty_like(affine.weight), torch.empty_like(affine.bias)
    results = *grad_x, grad_w_dot, grad_b_dot
    native.call("norm_relu_pool_dual_gradient", *grad, *x, *affine, moments, *results, pool)
    return grad_x, grad_w_dot, grad_b_dot


def join(first: Tensor, second: Tensor) -> Tensor:
    """Returns both tensors along the batch. Copies nothing if `second` follows `first` in one block of memory."""
    if torch.compiler.is_compiling() or not (
        first.shape == second.shape
        and first.stride() == second.stride()
        and first.dtype == second.dtype
        and first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and second.storage_offset() - first.storage_offset() == first.numel() == len(first) * first.stride(0)
    ):
        return torch.cat([first, second])
    return first.as_strided((2 * len(first), *first.shape[1:]), first.stride())


def norm_relu_pool_dual_reference(x: Dual, affine: Affine, eps: float = 1e-5, pool: bool = True) -> tuple[Dual, Tensor]:
    """Computes `norm_relu_pool_dual` in plain PyTorch, on any device and float type."""
    dtype = x.value.dtype
    x, affine = _wide(x, affine)
    variance, mean = torch.var_mean(x.value, (2, 3), correction=0, keepdim=True)
    mean_dot, rstd = x.dot.mean((2, 3), keepdim=True), (variance + eps).rsqrt()
    slope = ((x.value - mean) * x.dot).mean((2, 3), keepdim=True) * rstd
    moments = torch.stack([mean, rstd, mean_dot, slope])
    u, u_dot, positive, (weight, _, weight_dot, bias_dot), n = _parts(x, affine, moments)
    n_dot = (weight_dot * u + weight * u_dot + bias_dot) * positive
    y = n.relu(), n_dot
    return Dual(*((F.avg_pool2d(part, 2) if pool else part).to(dtype) for part in y)), moments[..., 0, 0]


def norm_relu_pool_dual_gradient_reference(
    grad: Dual, x: Dual, affine: Affine, moments: Tensor, pool: bool = True
) -> tuple[Dual, Tensor, Tensor]:
    """Computes `norm_relu_pool_dual_gradient` in plain PyTorch, on any device and float type."""
    dtype, weight_dtype, bias_dtype = x.value.dtype, affine.weight.dtype, affine.bias.dtype
    x, affine = _wide(x, affine)
    moments = moments[..., None, None]
    _, rstd, _, slope = moments
    u, u_dot, positive, (weight, _, weight_dot, _), _ = _parts(x, affine, moments)
    d, d_dot = (_unpooled(g.to(moments.dtype), x.value, pool) * positive for g in grad)

    def mean(value: Tensor) -> Tensor:
        return value.mean((2, 3), keepdim=True)

    wd, e = weight * d, weight_dot * d + weight * d_dot
    along = mean(wd * u)
    grad_x = rstd * (wd - mean(wd) - u * along)
    grad_x_dot = rstd * (e - mean(e) - u * mean(e * u + wd * u_dot) - u_dot * along) - rstd * slope * grad_x
    grad_w_dot, grad_b_dot = (d_dot * u + d * u_dot).sum((0, 2, 3)), d_dot.sum((0, 2, 3))
    return Dual(grad_x.to(dtype), grad_x_dot.to(dtype)), grad_w_dot.to(weight_dtype), grad_b_dot.to(bias_dtype)


def _wide(x: Dual, affine: Affine) -> tuple[Dual, Affine]:
    """Casts all inputs to the type of sums."""
    dtype = _accumulator(x.value)
    return Dual(*(part.to(dtype) for part in x)), Affine(*(part.to(dtype) for part in affine))


def _parts(x: Dual, affine: Affine, moments: Tensor) -> tuple[Tensor, Tensor, Tensor, Affine, Tensor]:
    """Returns u, u', which pixels are positive or NaN, the weights and biases [C, 1, 1], and the input of ReLU."""
    mean, rstd, mean_dot, slope = moments
    by_channel = Affine(*(part[:, None, None] for part in affine))
    u = (x.value - mean) * rstd
    n = by_channel.weight * u + by_channel.bias
    return u, rstd * (x.dot - mean_dot - u * slope), ~(n <= 0), by_channel, n


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
        if not part.is_floating_point() or part.shape != value.shape[1:2] or part.device != value.device:
            expected = f"expected floats ({value.shape[1]},) on {value.device}"
            raise ValueError(f"affine.{name}: {describe(part)}: {expected}")
    if not eps > 0:
        raise ValueError(f"eps: {eps}: expected more than 0")


def _check_gradient(grad: Dual, x: Dual, moments: Tensor, pool: bool) -> None:
    tensors = {"grad.value": grad.value, "grad.dot": grad.dot, "moments": moments}
    check_dense(**tensors)
    value = x.value
    for name, part in (("grad.value", grad.value), ("grad.dot", grad.dot)):
        check_like(name, part, _pooled_shape(value, pool), value.dtype, value.device)
    check_like("moments", moments, (4, *value.shape[:2]), _accumulator(value), value.device)


def _compiled(x: Dual, affine: Affine, **others: Tensor) -> str | None:
    """Returns the device type whose compiled code supports the inputs, or None. Raises ValueError for freed storage."""
    value = x.value
    if not is_direct(*x, *affine, *others.values()):
        return None
    check_memory(x_value=value, x_dot=x.dot, **affine._asdict(), **others)  # plain PyTorch may crash on it, too
    if value.is_cuda:
        return "cuda" if gpu.available() and value.dtype in (*ELEMENT_TYPES, torch.float64) else None
    covered = native.available() and all(
        part.is_contiguous(memory_format=torch.channels_last) and part.dtype == torch.float32 for part in x
    )
    return "cpu" if covered and all(part.dtype == torch.float32 for part in affine) else None


def _both(x: Dual, memory_format: torch.memory_format) -> Dual:
    """Returns value and tangent in this memory format."""
    return Dual(*(_in_format(part, memory_format) for part in x))


def _contiguous(affine: Affine) -> Affine:
    return Affine(*(_in_format(part, torch.contiguous_format) for part in affine))


def _halves(shape: tuple[int, ...], x: Tensor, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Returns two maps of this shape in one block of memory, with the type and device of x."""
    images, *others = shape
    both = torch.empty((2 * images, *others), dtype=x.dtype, device=x.device, memory_format=memory_format)
    return both[:images], both[images:]
