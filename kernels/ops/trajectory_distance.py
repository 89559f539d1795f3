"""Squared distance of a trained student from an expert, relative to that of their common start, in one read.

With the parameters θ_T of the student, the target θ* of the expert, and the start θ_0 of both:

    distance          |θ_T - θ*|²
    expert_distance   |θ_0 - θ*|²
    ratio             distance / expert_distance     the matching loss of MTT (Cazenavette et al., 2022, equation 3)

per row, or per row and segment (for example a layer). If expert_distance is 0, ratio is inf (NaN if distance is 0 too)
and its gradient is not finite. Differences and squares are float32, so differences above 1e19 overflow and those below
1e-19 underflow. On a CPU each lane adds at most 16 squares before the sums continue in float64. The relative error of a
sum is at most 1.3e-6 for any values, and within 1e-7 for random ones.

Use it for scoring and for outer losses. A second derivative raises RuntimeError. An inner loop that is differentiated
twice must use `trajectory_distance_reference`. This also holds under torch.compile: a custom operator inside such a
loop gives wrong second derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tadperf.kernels import gpu, native, registry
from tadperf.kernels.checks import check_dense, check_like, check_memory
from tadperf.kernels.dispatch import Route, is_direct, record_call, route
from tadperf.kernels.native import ELEMENT_TYPES

registry.register("trajectory_distance")


class TrajectoryDistance(NamedTuple):
    """Results of `trajectory_distance`: floats in the batch shape, with a last dimension for the segments if given."""

    distance: Tensor
    expert_distance: Tensor
    ratio: Tensor


def trajectory_distance(
    student: Tensor, target: Tensor, start: Tensor, segments: Sequence[int] | Tensor | None = None
) -> TrajectoryDistance:
    """Computes the squared distances to the target and their ratio (MTT, equation 3; formulas at the top of this file).

    student, target, start: float [..., P] with batch shapes that broadcast, any float types and strides. They are read
    in place if the parameters of a row are adjacent. segments: S lengths that sum to P, a tuple of ints or an int64
    tensor on the CPU (under torch.compile a tuple). Returns float32 (float64 if an input is float64) [...], or [..., S]
    with segments. Each result can be differentiated once with respect to each input. On a CPU compiled code gives the
    same bits for any number of threads. Raises ValueError for wrong shapes, types, devices or segments.
    """
    lengths, batch = _check(student, target, start, segments)
    chosen = route("trajectory_distance", student, target, start)
    if chosen is Route.REFERENCE:
        return trajectory_distance_reference(student, target, start, segments)
    if chosen is Route.DIRECT:
        check_memory(student=student, target=target, start=start)
    flat = _rows(student, batch), _rows(target, batch), _rows(start, batch)
    if chosen is Route.DISPATCHER or (torch.is_grad_enabled() and any(x.requires_grad for x in flat)):
        results = _operator(*flat, lengths)
    else:
        results = _forward(*flat, lengths)
    shape = batch if segments is None else (*batch, len(lengths))
    return TrajectoryDistance(*(result.view(shape) for result in results))


def trajectory_distance_reference(
    student: Tensor, target: Tensor, start: Tensor, segments: Sequence[int] | Tensor | None = None
) -> TrajectoryDistance:
    """Computes `trajectory_distance` in plain PyTorch, for any device and float type. Differentiable to any order."""
    lengths, batch = _check(student, target, start, segments)
    shape = batch if segments is None else (*batch, len(lengths))
    dtype = _result_type(student, target, start)
    s, t, u = (x.to(dtype) for x in (student, target, start))

    def sums(squares: Tensor) -> Tensor:
        parts = [part.sum(-1) for part in squares.split(lengths, -1)]
        total = parts[0] if segments is None else torch.stack(parts, -1)
        return total.expand(shape).contiguous()

    distance, expert_distance = sums((s - t).square()), sums((u - t).square())
    return TrajectoryDistance(distance, expert_distance, distance / expert_distance)


def student_gradient(student: Tensor, target: Tensor, of_distance: Tensor) -> Tensor:
    """Returns of_distance * (student - target), the gradient of the student, in one pass (tadperf).

    student, target: float [P]. of_distance: 0-dimensional, twice the gradient of `distance`; for the gradient of
    `ratio` it is 2 / expert_distance. For formulas, not for autograd.
    """
    factors = of_distance.reshape(1, 1)
    run = _gradients if is_direct(student, target, of_distance) else _gradient
    gradient, _, _ = run(
        student[None], target[None], target[None], factors, factors, [len(student)], [True, False, False]
    )
    return gradient[0]


def _check(
    student: Tensor, target: Tensor, start: Tensor, segments: Sequence[int] | Tensor | None
) -> tuple[list[int], tuple[int, ...]]:
    """Returns the lengths of the segments and the batch shape."""
    check_dense(student=student, target=target, start=start)
    for name, x in (("student", student), ("target", target), ("start", start)):
        if not x.is_floating_point() or x.ndim < 1 or x.shape[-1] != student.shape[-1] or x.device != student.device:
            raise ValueError(
                f"{name}: {x.dtype} {tuple(x.shape)} on {x.device}: expected floats [..., P], "
                f"with P and device of student, {tuple(student.shape)} on {student.device}"
            )
    shapes = [tuple(x.shape[:-1]) for x in (student, target, start)]
    try:
        # avoids broadcast_shapes, which takes 8 us
        batch = shapes[0] if shapes[0] == shapes[1] == shapes[2] else tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise ValueError(f"student, target, start: batch shapes {shapes}: expected shapes that broadcast") from None
    size = int(student.shape[-1])  # torch.jit.trace makes it a tensor
    if segments is None:
        return [size], batch
    if isinstance(segments, Tensor) and (segments.ndim != 1 or segments.dtype != torch.int64):
        raise ValueError(f"segments: {segments.dtype} {tuple(segments.shape)}: expected int64 [S]")
    lengths = segments.tolist() if isinstance(segments, Tensor) else list(segments)
    if not lengths or min(lengths) < 0 or sum(lengths) != size:
        raise ValueError(f"segments: {lengths}: expected lengths of 0 or more that sum to {size}")
    return lengths, batch


def _check_rows(student: Tensor, target: Tensor, start: Tensor, lengths: Sequence[int]) -> list[int]:
    """Checks inputs [B or 1, P] of the registered operators. Returns the lengths of the segments."""
    checked, _ = _check(student, target, start, list(lengths))
    for name, x in (("student", student), ("target", target), ("start", start)):
        if x.ndim != 2 or len(x) not in (1, _count(student, target, start)):
            raise ValueError(f"{name}: {tuple(x.shape)}: expected [B, P] or [1, P]")
    return checked


def _rows(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Returns x as [B, P], or as [1, P] if one row serves the whole batch."""
    single = math.prod(x.shape[:-1]) == 1
    return x.reshape(1, x.shape[-1]) if single else x.expand(*batch, x.shape[-1]).reshape(math.prod(batch), x.shape[-1])


def _count(*inputs: Tensor) -> int:
    return next((len(x) for x in inputs if len(x) != 1), 1)


def _result_type(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def _triple(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = tensors
    return first, second, third


def _adjacent(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


def _compiled(*inputs: Tensor) -> str | None:
    """Returns the device type whose compiled code supports these tensors, or None."""
    device = inputs[0].device.type
    supported = all(x.dtype in ELEMENT_TYPES for x in inputs)
    built = (device == "cpu" and native.available()) or (device == "cuda" and gpu.available())
    return device if supported and built else None


def _forward(student: Tensor, target: Tensor, start: Tensor, lengths: list[int]) -> TrajectoryDistance:
    inputs = (student, target, start)
    device = _compiled(*inputs)
    record_call("trajectory_distance", device)
    if device is None:
        with torch.no_grad():
            return trajectory_distance_reference(*inputs, lengths)
    adjacent = _adjacent(student), _adjacent(target), _adjacent(start)
    if device == "cuda":
        from tadperf.kernels.gpu import trajectory_distance as triton

        return TrajectoryDistance(*triton.trajectory_distance(*adjacent, lengths))
    shape = _count(*inputs), len(lengths)
    out = TrajectoryDistance(*(student.new_empty(shape, dtype=torch.float32) for _ in range(3)))
    native.call("trajectory_distance", *adjacent, lengths, *out)
    return out


@torch.library.custom_op("tadperf::trajectory_distance", mutates_args=())
def _operator(student: Tensor, target: Tensor, start: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    lengths = _check_rows(student, target, start, lengths)
    check_memory(student=student, target=target, start=start)
    return _forward(student, target, start, lengths)[:]  # a plain tuple


@_operator.register_fake
def _(student: Tensor, target: Tensor, start: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = (_count(student, target, start), len(lengths)), _result_type(student, target, start)
    return _triple(student.new_empty(shape, dtype=dtype) for _ in range(3))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.lengths = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, distance_grad: Tensor, expert_grad: Tensor, ratio_grad: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, expert_distance, ratio = ctx.saved_tensors
    used = ratio_grad != 0  # if the ratio is not used, an expert distance of 0 must not reach the other gradients
    of_distance = 2 * (distance_grad + torch.where(used, ratio_grad / expert_distance, 0))
    of_expert = 2 * (expert_grad - torch.where(used, ratio_grad * ratio / expert_distance, 0))
    needs = ctx.needs_input_grad[:3]
    grads = _gradient(*inputs, of_distance, of_expert, ctx.lengths, needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None


_operator.register_autograd(_backward, setup_context=_save)


def _gradient_reference(
    student: Tensor, target: Tensor, start: Tensor, of_distance: Tensor, of_expert: Tensor, lengths: list[int]
) -> list[Tensor]:
    dtype = of_distance.dtype
    s, t, u = (x.to(dtype) for x in (student, target, start))
    repeats = torch.tensor(lengths, device=s.device)
    a, b = (x.repeat_interleave(repeats, -1, output_size=s.shape[-1]) for x in (of_distance, of_expert))
    grad_student, grad_start = a * (s - t), b * (u - t)
    grads = grad_student, -(grad_student + grad_start), grad_start
    return [g.sum_to_size(x.shape).to(x.dtype) for g, x in zip(grads, (student, target, start), strict=True)]


def _gradients(
    student: Tensor,
    target: Tensor,
    start: Tensor,
    of_distance: Tensor,
    of_expert: Tensor,
    lengths: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of student, target and start; an empty tensor for a gradient that is not needed.

    student: of_distance * (student - target). start: of_expert * (start - target). target: minus the sum of both.
    """
    inputs, lengths = (student, target, start), _check_rows(student, target, start, lengths)
    shape = _count(*inputs), len(lengths)
    for name, x in (("of_distance", of_distance), ("of_expert", of_expert)):
        check_like(name, x, shape, _result_type(*inputs), student.device)
    check_memory(student=student, target=target, start=start, of_distance=of_distance, of_expert=of_expert)
    device, rows = _compiled(*inputs), _count(*inputs)
    record_call("trajectory_distance_gradient", None if rows == 0 else device)
    if device is None or rows == 0:
        grads = _gradient_reference(*inputs, of_distance, of_expert, lengths)
        return _triple(g if needed else g.new_empty(0) for g, needed in zip(grads, needs, strict=True))
    adjacent = _adjacent(student), _adjacent(target), _adjacent(start)
    of_distance, of_expert = of_distance.contiguous(), of_expert.contiguous()
    if device == "cuda":
        from tadperf.kernels.gpu import trajectory_distance as triton

        return _triple(triton.gradient(*adjacent, of_distance, of_expert, lengths, list(needs)))
    grads = []
    for x, needed in zip(inputs, needs, strict=True):
        shared = len(x) < rows  # the gradient is a sum over the rows, in float32
        grads.append(x.new_empty(x.shape if needed else (0, 0), dtype=torch.float32 if shared else x.dtype))
    native.call("trajectory_distance_gradient", *adjacent, lengths, of_distance, of_expert, *grads)
    results = zip(grads, inputs, needs, strict=True)
    return _triple(g.to(x.dtype) if needed else x.new_empty(0) for g, x, needed in results)


# A call through PyTorch's dispatcher imports its compiler, which takes 2 s.
_gradient = torch.library.custom_op("tadperf::trajectory_distance_gradient", mutates_args=())(_gradients)


@_gradient.register_fake
def _(
    student: Tensor,
    target: Tensor,
    start: Tensor,
    of_distance: Tensor,
    of_expert: Tensor,
    lengths: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (student, target, start)
    return _triple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip(inputs, needs, strict=True))


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError("trajectory_distance has no second derivative: use trajectory_distance_reference instead")


_gradient.register_autograd(_no_second_derivative)
