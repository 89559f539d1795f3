"""Squared distance of a trained student from an expert, and its share of the way the expert went, in one read.

With the student's parameters θ_T, the expert's target θ* and the start θ_0 that both set out from:

    distance  |θ_T - θ*|²
    way       |θ_0 - θ*|²
    ratio     distance / way      the matching loss of MTT (Cazenavette et al., 2022, equation 3)

all per row, or per row and segment (a layer, say). Where way is 0, ratio is inf, or NaN where distance is 0 as well,
and its gradient is not finite. Differences and squares are float32: their range ends where a difference exceeds 1e19 or
falls below 1e-19. On a CPU at most 16 squares are added in each lane before the sums go on in float64, so that a sum is
within 1.3e-6 of the exact one, relatively, whatever the values; on random ones it is within 1e-7.

For scoring and outer losses. There is no second derivative: asking for one raises. An inner loop that is differentiated
twice takes `trajectory_distance_reference`, also under torch.compile, where a custom operator inside such a loop is a
hazard of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.kernels import gpu, native

NARROW = (torch.float32, torch.bfloat16, torch.float16)  # what compiled code reads


class TrajectoryDistance(NamedTuple):
    """What `trajectory_distance` gives: floats in the batch shape, with a last dimension of segments where asked."""

    distance: Tensor
    way: Tensor
    ratio: Tensor


def trajectory_distance(
    student: Tensor, target: Tensor, start: Tensor, segments: Sequence[int] | Tensor | None = None
) -> TrajectoryDistance:
    """Distance to the target, the expert's way and their ratio (MTT, equation 3; see this module's first lines).

    student, target, start: float [..., P] whose batch shapes broadcast, of any float types and strides; read in
    place where parameters are adjacent. segments: S lengths that sum to P, a tuple of ints or an int64 tensor on the
    CPU (under torch.compile a tuple). Returns float32 (float64 where an input is) [...], or [..., S] with segments.
    All three results have a gradient for all three inputs, once differentiable. On a CPU compiled code gives the same
    bits for any number of threads. Raises ValueError for shapes, types, devices or segments that do not fit.
    """
    lengths, batch = _check(student, target, start, segments)
    flat = _rows(student, batch), _rows(target, batch), _rows(start, batch)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(x.requires_grad for x in flat)):
        results = _operator(*flat, lengths)
    else:
        results = _forward(*flat, lengths)  # the dispatcher would cost tens of microseconds
    shape = batch if segments is None else (*batch, len(lengths))
    return TrajectoryDistance(*(result.view(shape) for result in results))


def trajectory_distance_reference(
    student: Tensor, target: Tensor, start: Tensor, segments: Sequence[int] | Tensor | None = None
) -> TrajectoryDistance:
    """`trajectory_distance` in plain PyTorch, on any device and float dtype; differentiable to any order."""
    lengths, batch = _check(student, target, start, segments)
    shape = batch if segments is None else (*batch, len(lengths))
    dtype = _result_type(student, target, start)
    s, t, u = (x.to(dtype) for x in (student, target, start))

    def sums(squares: Tensor) -> Tensor:
        parts = [part.sum(-1) for part in squares.split(lengths, -1)]
        total = parts[0] if segments is None else torch.stack(parts, -1)
        return total.expand(shape).contiguous()

    distance, way = sums((s - t).square()), sums((u - t).square())
    return TrajectoryDistance(distance, way, distance / way)


def _check(
    student: Tensor, target: Tensor, start: Tensor, segments: Sequence[int] | Tensor | None
) -> tuple[list[int], tuple[int, ...]]:
    """The lengths of the segments and the batch shape."""
    for name, x in (("student", student), ("target", target), ("start", start)):
        if not x.is_floating_point() or x.ndim < 1 or x.shape[-1] != student.shape[-1] or x.device != student.device:
            raise ValueError(
                f"{name}: {x.dtype} {tuple(x.shape)} on {x.device}: expected floats [..., P], "
                f"P and device as student's {tuple(student.shape)} on {student.device}"
            )
    shapes = [tuple(x.shape[:-1]) for x in (student, target, start)]
    try:
        # broadcast_shapes takes 8 us
        batch = shapes[0] if shapes[0] == shapes[1] == shapes[2] else tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise ValueError(f"student, target, start: batch shapes {shapes}: expected ones that broadcast") from None
    size = student.shape[-1]
    if segments is None:
        return [size], batch
    if isinstance(segments, Tensor) and (segments.ndim != 1 or segments.dtype != torch.int64):
        raise ValueError(f"segments: {segments.dtype} {tuple(segments.shape)}: expected int64 [S]")
    lengths = segments.tolist() if isinstance(segments, Tensor) else list(segments)
    if not lengths or min(lengths) < 0 or sum(lengths) != size:
        raise ValueError(f"segments: {lengths}: expected lengths of 0 or more that sum to {size}")
    return lengths, batch


def _rows(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    """[B, P], or [1, P] where one row serves all of them."""
    alone = math.prod(x.shape[:-1]) == 1
    return x.reshape(1, x.shape[-1]) if alone else x.expand(*batch, x.shape[-1]).reshape(math.prod(batch), x.shape[-1])


def _count(*inputs: Tensor) -> int:
    return next((len(x) for x in inputs if len(x) != 1), 1)


def _result_type(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def _three(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = tensors
    return first, second, third


def _adjacent(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


def _compiled(*inputs: Tensor) -> str | None:
    """The device whose compiled code takes these tensors, or None."""
    device = inputs[0].device.type
    narrow = all(x.dtype in NARROW for x in inputs)
    built = (device == "cpu" and native.available()) or (device == "cuda" and gpu.available())
    return device if narrow and built else None


def _forward(student: Tensor, target: Tensor, start: Tensor, lengths: list[int]) -> TrajectoryDistance:
    inputs = (student, target, start)
    device = _compiled(*inputs)
    if device is None:
        with torch.no_grad():
            return trajectory_distance_reference(*inputs, lengths)
    adjacent = _adjacent(student), _adjacent(target), _adjacent(start)
    if device == "cuda":
        from tadperf.kernels.gpu import trajectory_distance as twin

        return TrajectoryDistance(*twin.trajectory_distance(*adjacent, lengths))
    out = TrajectoryDistance(*(torch.empty(_count(*inputs), len(lengths)) for _ in range(3)))
    module = native.module()
    assert module is not None
    module.trajectory_distance(*adjacent, lengths, *out, native.isa_index(), torch.get_num_threads())
    return out


@torch.library.custom_op("tadperf::trajectory_distance", mutates_args=())
def _operator(student: Tensor, target: Tensor, start: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(student, target, start, list(lengths))[:]  # a plain tuple


@_operator.register_fake
def _(student: Tensor, target: Tensor, start: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = (_count(student, target, start), len(lengths)), _result_type(student, target, start)
    return _three(student.new_empty(shape, dtype=dtype) for _ in range(3))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.lengths = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, distance_grad: Tensor, way_grad: Tensor, ratio_grad: Tensor):
    *inputs, way, ratio = ctx.saved_tensors
    used = ratio_grad != 0  # where the ratio is not used, a way of 0 must not reach the other gradients
    of_distance = 2 * (distance_grad + torch.where(used, ratio_grad / way, 0))
    of_way = 2 * (way_grad - torch.where(used, ratio_grad * ratio / way, 0))
    needs = ctx.needs_input_grad[:3]
    grads = _gradient(*inputs, of_distance, of_way, ctx.lengths, needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None


_operator.register_autograd(_backward, setup_context=_save)


def _gradient_reference(
    student: Tensor, target: Tensor, start: Tensor, of_distance: Tensor, of_way: Tensor, lengths: list[int]
) -> list[Tensor]:
    dtype = of_distance.dtype
    s, t, u = (x.to(dtype) for x in (student, target, start))
    repeats = torch.tensor(lengths, device=s.device)
    a, b = (x.repeat_interleave(repeats, -1, output_size=s.shape[-1]) for x in (of_distance, of_way))
    grad_student, grad_start = a * (s - t), b * (u - t)
    grads = grad_student, -(grad_student + grad_start), grad_start
    return [g.sum_to_size(x.shape).to(x.dtype) for g, x in zip(grads, (student, target, start), strict=True)]


@torch.library.custom_op("tadperf::trajectory_distance_gradient", mutates_args=())
def _gradient(
    student: Tensor,
    target: Tensor,
    start: Tensor,
    of_distance: Tensor,
    of_way: Tensor,
    lengths: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """of_distance * (student - target), that of start alike, and minus both; an empty tensor where not needed."""
    inputs, lengths = (student, target, start), list(lengths)
    device, rows = _compiled(*inputs), _count(*inputs)
    if device is None or rows == 0:
        grads = _gradient_reference(*inputs, of_distance, of_way, lengths)
        return _three(g if needed else g.new_empty(0) for g, needed in zip(grads, needs, strict=True))
    adjacent = _adjacent(student), _adjacent(target), _adjacent(start)
    of_distance, of_way = of_distance.contiguous(), of_way.contiguous()
    if device == "cuda":
        from tadperf.kernels.gpu import trajectory_distance as twin

        return _three(twin.gradient(*adjacent, of_distance, of_way, lengths, list(needs)))
    grads = []
    for x, needed in zip(inputs, needs, strict=True):
        shared = len(x) < rows  # summed over the rows, in float32
        grads.append(torch.empty(x.shape if needed else (0, 0), dtype=torch.float32 if shared else x.dtype))
    module = native.module()
    assert module is not None
    module.trajectory_distance_gradient(
        *adjacent, lengths, of_distance, of_way, *grads, native.isa_index(), torch.get_num_threads()
    )
    results = zip(grads, inputs, needs, strict=True)
    return _three(g.to(x.dtype) if needed else x.new_empty(0) for g, x, needed in results)


@_gradient.register_fake
def _(
    student: Tensor,
    target: Tensor,
    start: Tensor,
    of_distance: Tensor,
    of_way: Tensor,
    lengths: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (student, target, start)
    return _three(x.new_empty(x.shape if needed else (0,)) for x, needed in zip(inputs, needs, strict=True))


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "trajectory_distance has no second derivative: use trajectory_distance_reference where one is taken"
    )


_gradient.register_autograd(_no_second_derivative)
