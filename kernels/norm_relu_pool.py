"""Instance norm, ReLU and 2 x 2 average pool in one pass over the feature map, forward and backward.

Of each plane x (one channel of one image, P pixels), with that channel's weight w and bias b:

    mean     sum x / P
    rstd     (sum (x - mean)^2 / P + eps)^(-1/2)
    y        average over 2 x 2 pixels of max(0, (x - mean) rstd w + b)     an odd last row or column is left out

as group norm of one channel to a group, ReLU and AvgPool2d(2) after one another. With g the upstream gradient of a
pixel (a quarter of its pooled pixel's) where that pixel was positive, 0 elsewhere, and u = (x - mean) rstd:

    of b     sum g,     of w     sum g u,     of x     rstd w (g - sum g / P - u sum (g u) / P)

Backward keeps x, mean and rstd, and computes again which pixels were positive: no map is saved but x. A NaN or an
infinity in a plane makes all of that plane NaN. A convolution before it needs no bias: instance norm takes off a shift
that a channel has in common, and that bias's gradient is 0 but for rounding.

For first-order training alone: experts, students, proxies. There is no second derivative, and asking for one raises;
what is differentiated twice takes `norm_relu_pool_reference`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.kernels import gpu, native

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as kernels/cpu/rows.h numbers them
TRANSPOSED = 1024  # pixels of the largest contiguous plane whose width need not be a multiple of 32


def norm_relu_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, pool: bool = True) -> Tensor:
    """Instance norm with weight and bias, ReLU and 2 x 2 average pool (tadperf; see this module's first lines).

    x: float [N, C, H, W], contiguous or channels_last (else it is copied); weight, bias: float [C]. Returns
    [N, C, H // 2, W // 2], or [N, C, H, W] with pool=False, in the type and memory format of x; sums are float32, or
    float64 for float64. float32, bfloat16 and float16 run compiled code on a CPU, with the same bits for any number of
    threads, and a Triton kernel on CUDA; the rest runs plain PyTorch. Once differentiable. Raises ValueError for
    shapes, types, devices or an eps that do not fit, RuntimeError where a second derivative is asked for.
    """
    _check(x, weight, bias, eps, pool)
    if torch.compiler.is_compiling():
        return _operator(x, weight, bias, eps, pool)[0]
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _NormReluPool.apply(x, weight, bias, eps, pool)
    return _forward(x, weight, bias, eps, pool)[0]


def norm_relu_pool_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, pool: bool = True) -> Tensor:
    """`norm_relu_pool` in plain PyTorch, on any device and float dtype; differentiable by autograd to any order."""
    _check(x, weight, bias, eps, pool)
    wide = _accumulator(x)
    y = F.group_norm(x.to(wide), x.shape[1], weight.to(wide), bias.to(wide), eps).relu()
    return (F.avg_pool2d(y, 2) if pool else y).to(x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> None:
    least = 2 if pool else 1
    if not x.is_floating_point() or x.ndim != 4 or x.shape[1] < 1 or min(x.shape[2:]) < least:
        raise ValueError(f"x: {x.dtype} {tuple(x.shape)}: expected floats [N, C, H, W], H and W of {least} or more")
    for name, of_channel in (("weight", weight), ("bias", bias)):
        if not of_channel.is_floating_point() or of_channel.shape != x.shape[1:2] or of_channel.device != x.device:
            raise ValueError(
                f"{name}: {of_channel.dtype} {tuple(of_channel.shape)} on {of_channel.device}: "
                f"expected floats ({x.shape[1]},) on {x.device}"
            )
    if not eps > 0:
        raise ValueError(f"eps: {eps}: expected more than 0")


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _format(x: Tensor) -> torch.memory_format:
    """What the results lie in; where a shape is both, contiguous."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _compiled(x: Tensor) -> str | None:
    """The device whose compiled code takes these planes, or None."""
    if torch.compiler.is_compiling():
        return None
    built = (x.is_cpu and native.available()) or (x.is_cuda and gpu.available())
    return x.device.type if built and x.dtype in KINDS else None


def _pooled(x: Tensor, pool: bool) -> tuple[int, int, int, int]:
    images, channels, height, width = x.shape
    return (images, channels, height // 2, width // 2) if pool else (images, channels, height, width)


def _laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    return (x.resolve_neg() if x.is_neg() else x).contiguous(memory_format=memory_format)


def _float32(of_channel: Tensor) -> Tensor:
    return _laid_out(of_channel.float(), torch.contiguous_format)


def _native_format(x: Tensor) -> torch.memory_format:
    """That of x; but a large contiguous plane of an uneven width goes through channels_last."""
    uneven = x.shape[2] * x.shape[3] > TRANSPOSED and x.shape[3] % 32 != 0
    return torch.channels_last if uneven else _format(x)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> tuple[Tensor, Tensor]:
    """y, and the mean and rstd of each plane, [2, N, C]."""
    device, wanted = _compiled(x), _format(x)
    if device is None:
        return _forward_reference(x, weight, bias, eps, pool)
    if device == "cuda":
        from tadperf.kernels.gpu import norm_relu_pool as twin

        return twin.norm_relu_pool(_laid_out(x, wanted), weight, bias, eps, pool)
    layout = _native_format(x)
    data, scale, shift = _laid_out(x, layout), _float32(weight), _float32(bias)
    y = torch.empty(_pooled(x, pool), dtype=x.dtype, memory_format=layout, device="cpu")
    moments = torch.empty((2, *x.shape[:2]), dtype=torch.float32, device="cpu")
    module = native.module()
    assert module is not None
    module.norm_relu_pool(
        data.data_ptr(), KINDS[x.dtype], *x.shape, layout is torch.channels_last, pool,
        scale.data_ptr(), shift.data_ptr(), moments.data_ptr(),
        eps, y.data_ptr(), native.isa_index(), torch.get_num_threads(),
    )  # fmt: skip
    return y if layout is wanted else y.contiguous(), moments


def _forward_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.to(_accumulator(x)), (2, 3), correction=0)
    y = norm_relu_pool_reference(x, weight, bias, eps, pool)
    return y.contiguous(memory_format=_format(x)), torch.stack((mean, (variance + eps).rsqrt()))


def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    device, wanted = _compiled(x), _format(x)
    if device is None:
        return _backward_reference(grad_y, x, weight, bias, moments, pool)
    if device == "cuda":
        from tadperf.kernels.gpu import norm_relu_pool as twin

        laid_out = _laid_out(grad_y, wanted), _laid_out(x, wanted)
        return twin.norm_relu_pool_gradient(*laid_out, weight, bias, moments, pool)
    layout = _native_format(x)
    data, upstream = _laid_out(x, layout), _laid_out(grad_y, layout)
    scale, shift = _float32(weight), _float32(bias)
    grad_x, of_weight, of_bias = torch.empty_like(data), torch.empty_like(scale), torch.empty_like(shift)
    module = native.module()
    assert module is not None
    module.norm_relu_pool_gradient(
        data.data_ptr(), KINDS[x.dtype], *x.shape, layout is torch.channels_last, pool,
        scale.data_ptr(), shift.data_ptr(), moments.data_ptr(), upstream.data_ptr(),
        grad_x.data_ptr(), of_weight.data_ptr(), of_bias.data_ptr(), native.isa_index(), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x if layout is wanted else grad_x.contiguous(), of_weight.to(weight.dtype), of_bias.to(bias.dtype)


def _backward_reference(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = moments[..., None, None]
    u = (x.to(moments.dtype) - mean) * rstd
    scale, shift = (of_channel.to(moments.dtype)[:, None, None] for of_channel in (weight, bias))
    g = grad_y.to(moments.dtype)
    if pool:
        g = (g / 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
        g = F.pad(g, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    g = torch.where(u * scale + shift <= 0, 0, g)
    of_bias, of_weight = g.sum((2, 3), keepdim=True), (g * u).sum((2, 3), keepdim=True)
    grad_x = rstd * scale * (g - (of_bias + u * of_weight) / (x.shape[2] * x.shape[3]))
    grad_x = grad_x.to(x.dtype).contiguous(memory_format=_format(x))
    return grad_x, of_weight.sum((0, 2, 3)).to(weight.dtype), of_bias.sum((0, 2, 3)).to(bias.dtype)


class _NormReluPool(torch.autograd.Function):
    """The eager way: the dispatcher and its autograd would cost tens of microseconds."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> Tensor:
        y, moments = _forward(x, weight, bias, eps, pool)
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.pool = pool
        return y

    @staticmethod
    def backward(ctx, grad_y: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # by create_graph; once_differentiable would let a constant grad_y through
            raise RuntimeError("norm_relu_pool has no second derivative: take norm_relu_pool_reference")
        x, weight, bias, moments = ctx.saved_tensors
        return *_backward(grad_y, x, weight, bias, moments, ctx.pool), None, None


@torch.library.custom_op("tadperf::norm_relu_pool", mutates_args=())
def _operator(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, bias, eps, pool)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty(_pooled(x, pool), dtype=x.dtype, device=x.device, memory_format=_format(x))
    return y, x.new_empty((2, *x.shape[:2]), dtype=_accumulator(x))


@torch.library.custom_op("tadperf::norm_relu_pool_gradient", mutates_args=())
def _gradient(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad_y, x, weight, bias, moments, pool)


@_gradient.register_fake
def _(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_format(x))
    return grad_x, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, _, ctx.pool = inputs
    ctx.save_for_backward(x, weight, bias, output[1])


def _operator_backward(ctx, grad_y: Tensor, _: Tensor | None):
    x, weight, bias, moments = ctx.saved_tensors
    return *_gradient(grad_y, x, weight, bias, moments, ctx.pool), None, None


_operator.register_autograd(_operator_backward, setup_context=_save)


def norm_relu_pool_moments(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, pool: bool = True
) -> tuple[Tensor, Tensor]:
    """`norm_relu_pool` without a graph, and the mean and rstd of each plane [2, N, C], which its gradient needs."""
    return _forward(x, weight, bias, eps, pool)


def norm_relu_pool_gradient(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, pool: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight [C] and bias [C] from that of y, without a graph; moments: of `norm_relu_pool_moments`."""
    return _backward(grad_y, x, weight, bias, moments, pool)
