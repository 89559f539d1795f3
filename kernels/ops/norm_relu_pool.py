"""Instance norm, ReLU and 2 x 2 average pool in one pass over the feature map, forward and backward.

For each plane x (one channel of one image, P pixels), with the weight w and bias b of its channel:

    mean     sum x / P
    rstd     (sum (x - mean)^2 / P + eps)^(-1/2)
    y        average over 2 x 2 pixels of max(0, (x - mean) rstd w + b)     an odd last row or column is left out

This equals group norm with one channel per group, then ReLU, then AvgPool2d(2). For the gradients, let g be the
upstream gradient of a pixel (a quarter of that of its pooled pixel) if ReLU passed the pixel, and 0 otherwise. With
u = (x - mean) rstd:

    bias     sum g
    weight   sum g u
    x        rstd w (g - sum g / P - u sum (g u) / P)

The backward pass keeps x, mean and rstd, and computes again which pixels ReLU passed. It saves no other map. A NaN or
an infinity makes its whole plane NaN. Values of about 1e19 and more overflow when they are squared; the result of their
plane is then meaningless. A convolution before this operator needs no bias: instance norm removes a shift of a channel,
and the gradient of that bias is 0 up to rounding.

For first-order training only: experts, students, proxies. A second derivative raises RuntimeError. Use
`norm_relu_pool_reference` for anything that is differentiated twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.kernels import gpu, native, registry
from tadperf.kernels.checks import check_dense, check_like, check_memory
from tadperf.kernels.dispatch import Route, record_call, route
from tadperf.kernels.native import ELEMENT_TYPES

registry.register("norm_relu_pool")


def norm_relu_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, pool: bool = True) -> Tensor:
    """Applies instance norm, ReLU and 2 x 2 average pool (tadperf; formulas at the top of this file).

    x: float [N, C, H, W], contiguous or channels_last (any other layout is copied). weight, bias: float [C]. Returns
    [N, C, H // 2, W // 2], or [N, C, H, W] with pool=False, in the type and memory format of x. Sums are float32, or
    float64 for float64. On a CPU float32, bfloat16 and float16 run compiled code, with the same bits for any number of
    threads. On CUDA they run a Triton kernel. All else runs plain PyTorch. The result can be differentiated once.
    Raises ValueError for wrong shapes, types, devices or eps, and RuntimeError for a second derivative.
    """
    _check(x, weight, bias, eps, pool)
    chosen = route("norm_relu_pool", x, weight, bias)
    if chosen is Route.REFERENCE:
        return norm_relu_pool_reference(x, weight, bias, eps, pool)
    if chosen is Route.DISPATCHER:
        return _operator(x, weight, bias, float(eps), pool)[0]
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _NormReluPool.apply(x, weight, bias, eps, pool)
    return _forward(x, weight, bias, eps, pool)[0]


def norm_relu_pool_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, pool: bool = True) -> Tensor:
    """Computes `norm_relu_pool` in plain PyTorch, for any device and float type. Can be differentiated to any order."""
    _check(x, weight, bias, eps, pool)
    wide = _accumulator(x)
    y = F.group_norm(x.to(wide), x.shape[1], weight.to(wide), bias.to(wide), eps).relu()
    return (F.avg_pool2d(y, 2) if pool else y).to(x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> None:
    check_dense(x=x, weight=weight, bias=bias)
    least, shape, device = 2 if pool else 1, x.shape, x.device
    if not x.is_floating_point() or len(shape) != 4 or shape[1] < 1 or shape[2] < least or shape[3] < least:
        raise ValueError(f"x: {x.dtype} {tuple(shape)}: expected floats [N, C, H, W], H and W of {least} or more")
    channels = shape[1:2]
    for name, values in (("weight", weight), ("bias", bias)):
        if not values.is_floating_point() or values.shape != channels or values.device != device:
            raise ValueError(
                f"{name}: {values.dtype} {tuple(values.shape)} on {values.device}: "
                f"expected floats ({shape[1]},) on {device}"
            )
    if not eps > 0:
        raise ValueError(f"eps: {eps}: expected more than 0")


def _check_gradient(grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, pool: bool) -> None:
    _check(x, weight, bias, 1, pool)
    check_dense(grad_y=grad_y, moments=moments)
    check_like("grad_y", grad_y, _pooled_shape(x, pool), x.dtype, x.device)
    check_like("moments", moments, (2, *x.shape[:2]), _accumulator(x), x.device)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _format(x: Tensor) -> torch.memory_format:
    """Returns the memory format of the results: channels_last if x has only that format, else contiguous."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _compiled(x: Tensor) -> str | None:
    """Returns the device type whose compiled code supports x, or None."""
    if x.dtype not in ELEMENT_TYPES:
        return None
    if x.is_cpu and native.available():
        return "cpu"
    return "cuda" if x.is_cuda and gpu.available() else None


def _pooled_shape(x: Tensor, pool: bool) -> tuple[int, int, int, int]:
    images, channels, height, width = x.shape
    return (images, channels, height // 2, width // 2) if pool else (images, channels, height, width)


def _in_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    return (x.resolve_neg() if x.is_neg() else x).contiguous(memory_format=memory_format)


def _float32(values: Tensor) -> Tensor:
    """Returns values [C] as contiguous float32, without lazy negation."""
    if values.dtype is torch.float32 and values.is_contiguous() and not values.is_neg():
        return values  # 0.3 us less than calls that change nothing
    return _in_format(values.float(), torch.contiguous_format)


def _native_format(x: Tensor, wanted: torch.memory_format) -> torch.memory_format:
    """Returns the memory format that compiled code uses.

    It is `wanted`, the format of x, except for large planes with a width that is not a multiple of 32: these use
    channels_last.
    """
    module = native.module()
    assert module is not None
    if 0 < x.numel() <= module.MAX_PIXELS_OF_ANY_WIDTH:  # 0.2 us less for small maps
        return wanted
    _, _, height, width = x.shape
    large = height * width > module.MAX_PIXELS_OF_ANY_WIDTH
    return torch.channels_last if large and width % module.WIDTH_MULTIPLE != 0 else wanted


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> tuple[Tensor, Tensor]:
    """Returns y, and the mean and rstd of each plane [2, N, C]."""
    check_memory(x=x, weight=weight, bias=bias)
    device, wanted = _compiled(x), _format(x)
    record_call("norm_relu_pool", device)
    if device is None:
        return _forward_reference(x, weight, bias, eps, pool)
    if device == "cuda":
        from tadperf.kernels.gpu import norm_relu_pool as triton

        return triton.norm_relu_pool(_in_format(x, wanted), weight, bias, eps, pool)
    layout = _native_format(x, wanted)
    images, channels, height, width = _pooled_shape(x, pool)
    if layout is torch.contiguous_format:
        y = x.new_empty(images, channels, height, width)  # sizes as integers take 1 us less than as a tuple
    else:
        y = torch.empty(images, channels, height, width, dtype=x.dtype, memory_format=layout, device=x.device)
    weight, bias = _float32(weight), _float32(bias)
    moments = weight.new_empty(2, images, channels)
    tensors = _in_format(x, layout), weight, bias, moments, y
    native.call_resolved("norm_relu_pool", tensors, eps, layout is torch.channels_last, pool)
    return y if layout is wanted else y.contiguous(), moments


def _forward_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.to(_accumulator(x)), (2, 3), correction=0)
    y = norm_relu_pool_reference(x, weight, bias, eps, pool)
    return y.contiguous(memory_format=_format(x)), torch.stack((mean, (variance + eps).rsqrt()))


def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight and bias."""
    check_memory(grad_y=grad_y, x=x, weight=weight, bias=bias, moments=moments)
    device, wanted = _compiled(x), _format(x)
    record_call("norm_relu_pool_gradient", device)
    if device is None:
        return _backward_reference(grad_y, x, weight, bias, moments, pool)
    if device == "cuda":
        from tadperf.kernels.gpu import norm_relu_pool as triton

        maps = _in_format(grad_y, _format(grad_y)), _in_format(x, wanted)
        return triton.norm_relu_pool_gradient(*maps, weight, bias, moments.contiguous(), pool)
    layout = _native_format(x, wanted)
    inputs = _in_format(grad_y, layout), _in_format(x, layout), _float32(weight), _float32(bias)
    _, *like = inputs
    grad_x, grad_weight, grad_bias = (torch.empty_like(part) for part in like)
    results = grad_x, grad_weight, grad_bias
    native.call("norm_relu_pool_gradient", *inputs, moments.contiguous(), *results, layout is torch.channels_last, pool)
    return grad_x if layout is wanted else grad_x.contiguous(), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _backward_reference(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = moments[..., None, None]
    u = (x.to(moments.dtype) - mean) * rstd
    scale, shift = (values.to(moments.dtype)[:, None, None] for values in (weight, bias))
    g = grad_y.to(moments.dtype)
    if pool:
        g = (g / 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
        g = F.pad(g, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    g = torch.where(u * scale + shift <= 0, 0, g)
    grad_bias, grad_weight = g.sum((2, 3), keepdim=True), (g * u).sum((2, 3), keepdim=True)
    grad_x = rstd * scale * (g - (grad_bias + u * grad_weight) / (x.shape[2] * x.shape[3]))
    grad_x = grad_x.to(x.dtype).contiguous(memory_format=_format(x))
    return grad_x, grad_weight.sum((0, 2, 3)).to(weight.dtype), grad_bias.sum((0, 2, 3)).to(bias.dtype)


class _NormReluPool(torch.autograd.Function):
    """Gives the gradient outside of torch.compile, because PyTorch's dispatcher would add tens of microseconds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> Tensor:
        y, moments = _forward(x, weight, bias, eps, pool)
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.pool = pool
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        # create_graph=True enables gradients here. once_differentiable would not raise if grad_y is a constant.
        if torch.is_grad_enabled():
            raise RuntimeError("norm_relu_pool has no second derivative: use norm_relu_pool_reference")
        x, weight, bias, moments = ctx.saved_tensors
        return *_backward(grad_y, x, weight, bias, moments, ctx.pool), None, None


@torch.library.custom_op("tadperf::norm_relu_pool", mutates_args=())
def _operator(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias, eps, pool)
    return _forward(x, weight, bias, eps, pool)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty(_pooled_shape(x, pool), dtype=x.dtype, device=x.device, memory_format=_format(x))
    return y, x.new_empty((2, *x.shape[:2]), dtype=_accumulator(x))


@torch.library.custom_op("tadperf::norm_relu_pool_gradient", mutates_args=())
def _gradient(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_gradient(grad_y, x, weight, bias, moments, pool)
    grad_x, grad_weight, grad_bias = _backward(grad_y, x, weight, bias, moments, pool)
    # On CUDA both are rows of one tensor, and PyTorch refuses operators with results that share memory.
    return grad_x, grad_weight, grad_bias.clone()


@_gradient.register_fake
def _(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_format(x))
    return grad_x, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.pool = inputs
    ctx.save_for_backward(x, weight, bias, output[1])


def _operator_backward(ctx: Any, grad_y: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, moments = ctx.saved_tensors
    return *_gradient(grad_y, x, weight, bias, moments, ctx.pool), None, None


_operator.register_autograd(_operator_backward, setup_context=_save)


def norm_relu_pool_moments(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, pool: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns the result of `norm_relu_pool` without a graph, and the mean and rstd of each plane, [2, N, C]."""
    _check(x, weight, bias, eps, pool)
    chosen = route("norm_relu_pool", x, weight, bias)
    inputs = x.detach(), weight.detach(), bias.detach()
    if chosen is Route.REFERENCE or torch.compiler.is_compiling():
        return _forward_reference(*inputs, eps, pool)
    run = _operator if chosen is Route.DISPATCHER else _forward
    return run(*inputs, float(eps), pool)


def norm_relu_pool_gradient(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, pool: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight [C] and bias [C], without a graph. moments: from `norm_relu_pool_moments`."""
    _check_gradient(grad_y, x, weight, bias, moments, pool)
    chosen = route("norm_relu_pool", grad_y, x, weight, bias, moments)
    inputs = grad_y.detach(), x.detach(), weight.detach(), bias.detach(), moments.detach()
    if chosen is Route.REFERENCE or torch.compiler.is_compiling():
        return _backward_reference(*inputs, pool)
    run = _gradient if chosen is Route.DISPATCHER else _backward
    return run(*inputs, pool)
