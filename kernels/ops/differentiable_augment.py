"""Differentiable augmentation of images [C, H, W] (DSA; Zhao and Bilen, 2021) in one pass, and its adjoint.

With brightness b, saturation s, contrast r, a map f from output pixels q to input coordinates, and a hole:

    v(p)   x(p) + b
    w(p)   g + s (v(p) - g),   g = mean of v(p) over the channels    (w = v if C = 1)
    t(p)   m + r (w(p) - m),   m = mean of w over the image
    y(q)   sum over pixels p of k(f(q) - p) t(p),   k(d) = max(0, 1 - |d_x|) max(0, 1 - |d_y|);   0 inside the hole

k is bilinear interpolation, with 0 outside of the image. Each part is optional. y is linear in x up to the brightness.
For an upstream gradient G the adjoint of the linear part is

    u(p)        sum over q outside of the hole of k(f(q) - p) G(q)
    G_x(p)      r (g + s (u(p) - g)) + (1 - r) m,   g = mean of u(p) over the channels, m = mean of u over the image

because the change of the colours equals its own adjoint. Both directions can be differentiated to any order: the
derivative of the operator is the adjoint, and that of the adjoint is the operator without brightness.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.kernels import gpu, registry
from tadperf.kernels.checks import check_dense, check_memory, describe
from tadperf.kernels.dispatch import is_direct, record_call
from tadperf.kernels.native import ELEMENT_TYPES

registry.register("differentiable_augment", cpu="reference")

Parts = tuple[Tensor | None, Tensor | None, Tensor | None]  # affine, color, hole
MAX_CHANNELS = 64  # the channels of a pixel are one tile of the Triton kernels; images have 1 to 4


def differentiable_augment(
    x: Tensor, affine: Tensor | None = None, color: Tensor | None = None, hole: Tensor | None = None, hole_side: int = 1
) -> Tensor:
    """Changes colours, resamples and cuts out, each image in its own way (DSA; formulas at the top of this file).

    x: float [N, C, H, W]. affine: [N, 2, 3], maps output coordinates to input coordinates, both from -1 to 1 as in
    `affine_grid` with align_corners=False; finite. color: [N, 3], brightness, saturation and contrast. hole: [N, 2],
    row and column of the centre of a square of `hole_side` pixels; NaN for no hole. The three are floats, read as
    float32 (as float64 for float64 images). None leaves a part out; without any part the result is x itself. The result
    has the type of x. Differentiable in x to any order.
    On CUDA float32, bfloat16 and float16 run one Triton kernel with the same bits in every run. All else runs plain
    PyTorch, also under torch.compile. Raises ValueError for wrong shapes, types or devices.
    """
    return _augment("x", x, (affine, color, hole), hole_side, False)


def differentiable_augment_adjoint(
    grad: Tensor,
    affine: Tensor | None = None,
    color: Tensor | None = None,
    hole: Tensor | None = None,
    hole_side: int = 1,
) -> Tensor:
    """Returns the gradient of x [N, C, H, W] for the gradient of the result of `differentiable_augment`.

    It does not depend on x. Each input pixel gathers from the output pixels that read it, so no sum depends on the
    order of programs. Other arguments and errors as for `differentiable_augment`.
    """
    return _augment("grad", grad, (affine, color, hole), hole_side, True)


def differentiable_augment_reference(
    x: Tensor, affine: Tensor | None = None, color: Tensor | None = None, hole: Tensor | None = None, hole_side: int = 1
) -> Tensor:
    """Computes `differentiable_augment` in plain PyTorch, for any device and float type."""
    _check("x", x, (affine, color, hole), hole_side)
    if affine is color is hole is None or len(x) == 0:
        return x
    dtype, x = x.dtype, x.to(_wide(x))
    if color is not None:
        x = _recolour(x, *color.to(x)[:, :, None, None, None].unbind(1))
    if affine is not None:
        grid = _sampling_grid(affine.to(x), x.shape)
        x = F.grid_sample(x, grid, align_corners=False)
    if hole is not None:
        x = x.masked_fill(_hidden(x, hole, hole_side), 0.0)
    return x.to(dtype)


def differentiable_augment_adjoint_reference(
    grad: Tensor,
    affine: Tensor | None = None,
    color: Tensor | None = None,
    hole: Tensor | None = None,
    hole_side: int = 1,
) -> Tensor:
    """Computes `differentiable_augment_adjoint` in plain PyTorch, for any device and float type."""
    _check("grad", grad, (affine, color, hole), hole_side)
    if affine is color is hole is None or len(grad) == 0:
        return grad
    dtype, u = grad.dtype, grad.to(_wide(grad))
    if hole is not None:
        u = u.masked_fill(_hidden(u, hole, hole_side), 0.0)
    if affine is not None:
        u = _scatter(u, affine.to(u))
    if color is not None:
        _, saturation, contrast = color.to(u)[:, :, None, None, None].unbind(1)
        u = _recolour(u, None, saturation, contrast)
    return u.to(dtype)


def is_fused(x: Tensor, *parts: Tensor | None) -> bool:
    """Returns whether x [N, C, H, W] runs the Triton kernels."""
    return (
        x.is_cuda
        and x.dtype in ELEMENT_TYPES
        and x.shape[1] <= MAX_CHANNELS
        and is_direct(x, *parts)
        and not (torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts))
        and gpu.available()
    )


def _augment(name: str, x: Tensor, parts: Parts, hole_side: int, adjoint: bool) -> Tensor:
    _check(name, x, parts, hole_side)
    if is_direct(x, *parts):
        affine, color, hole = parts
        check_memory(**{name: x}, affine=affine, color=color, hole=hole)
    fused = is_fused(x, *parts)
    record_call("differentiable_augment_adjoint" if adjoint else "differentiable_augment", "cuda" if fused else None)
    if not fused:
        reference = differentiable_augment_adjoint_reference if adjoint else differentiable_augment_reference
        return reference(x, *parts, hole_side)
    if all(part is None for part in parts):
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return _Augment.apply(x, *parts, hole_side, adjoint)
    return _launch(x, parts, hole_side, adjoint)


def _launch(x: Tensor, parts: Parts, hole_side: int, adjoint: bool) -> Tensor:
    from tadperf.kernels.gpu import differentiable_augment as triton

    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    x = (x.resolve_neg() if x.is_neg() else x).detach().contiguous(memory_format=wanted)
    affine, color, hole = (None if part is None else _float32(part) for part in parts)
    launch = triton.differentiable_augment_adjoint if adjoint else triton.differentiable_augment
    return launch(x, affine, color, hole, hole_side)


def _float32(part: Tensor) -> Tensor:
    part = part.detach().float()
    return (part.resolve_neg() if part.is_neg() else part).contiguous()


class _Augment(torch.autograd.Function):
    """The compiled operator or its adjoint; each is the derivative of the other one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        affine: Tensor | None,
        color: Tensor | None,
        hole: Tensor | None,
        hole_side: int,
        adjoint: bool,
    ) -> Tensor:
        ctx.save_for_backward(affine, color, hole)
        ctx.hole_side, ctx.adjoint = hole_side, adjoint
        return _launch(x, (affine, color, hole), hole_side, adjoint)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        affine, color, hole = ctx.saved_tensors
        if color is not None and ctx.adjoint:  # the linear part has no brightness
            color = torch.cat([torch.zeros_like(color[:, :1]), color[:, 1:]], 1)
        x = _augment("grad", grad, (affine, color, hole), ctx.hole_side, not ctx.adjoint)
        return x, None, None, None, None, None


def _recolour(x: Tensor, brightness: Tensor | None, saturation: Tensor, contrast: Tensor) -> Tensor:
    if brightness is not None:
        x = x + brightness
    if x.shape[1] > 1:
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * contrast


def _hidden(x: Tensor, hole: Tensor, side: int) -> Tensor:
    """Returns which pixels lie in the hole, bool [N, 1, H, W]. Comparisons with NaN are false: no hole."""
    height, width = x.shape[2:]
    row, column = hole[:, :, None].unbind(1)  # [N, 1]
    rows = (torch.arange(height, device=x.device) - row + side // 2).floor_divide(side) == 0
    columns = (torch.arange(width, device=x.device) - column + side // 2).floor_divide(side) == 0
    return rows[:, None, :, None] & columns[:, None, None, :]


def _sampling_grid(affine: Tensor, shape: torch.Size) -> Tensor:
    """Returns the input coordinates that each output pixel reads, [N, H, W, 2] from -1 to 1.

    On CUDA `affine_grid` is a matrix product, which TF32 would round: by 0.01 pixels for images of 32 x 32.
    """
    if not affine.is_cuda:
        return F.affine_grid(affine, list(shape), align_corners=False)
    x, y = (
        ((2 * torch.arange(size, dtype=affine.dtype, device=affine.device) + 1) / size - 1)[:, None]
        for size in (shape[3], shape[2])
    )
    by_x, by_y, shift = affine[:, None, None].unbind(-1)  # [N, 1, 1, 2]
    return by_x * x + by_y * y[:, None] + shift


def _scatter(grad: Tensor, affine: Tensor) -> Tensor:
    """Adds each output pixel's gradient to the four input pixels around its source: the adjoint of grid_sample."""
    images, _, height, width = grad.shape
    grid = _sampling_grid(affine, grad.shape).reshape(images, -1, 2)
    size = grid.new_tensor([width, height])
    source = ((grid + 1) * size - 1) / 2
    first, flat = source.floor(), grad.flatten(2)
    result = torch.zeros_like(flat)
    for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
        at = first + first.new_tensor(corner)
        inside = ((at >= 0) & (at < size)).all(2)
        weight = torch.where(inside, (1 - (source - at).abs()).prod(2), 0)
        column, row = torch.where(inside[..., None], at, 0).long().unbind(2)
        index = (row * width + column)[:, None].expand_as(flat)
        result = result.scatter_add(2, index, flat * weight[:, None])
    return result.view(grad.shape)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(name: str, x: Tensor, parts: Parts, hole_side: int) -> None:
    affine, color, hole = parts
    check_dense(**{name: x}, affine=affine, color=color, hole=hole)
    if not x.is_floating_point() or x.ndim != 4 or min(x.shape[1:]) < 1:
        raise ValueError(f"{name}: {x.dtype} {tuple(x.shape)}: expected floats [N, C, H, W], C, H and W of 1 or more")
    for field, part, shape in (("affine", affine, (2, 3)), ("color", color, (3,)), ("hole", hole, (2,))):
        if part is None:
            continue
        if not part.is_floating_point() or part.shape != (len(x), *shape) or part.device != x.device:
            wanted = ", ".join(map(str, (len(x), *shape)))
            raise ValueError(f"{field}: {describe(part)}: expected floats ({wanted}) on {x.device}")
    if hole is not None and hole_side < 1:
        raise ValueError(f"hole_side: {hole_side}: expected 1 or more")
