"""`trajectory_distance` in Triton: one kernel sums blocks, a second one adds the sums in float64. Uses no atomics."""

# Pyright reads a launch, kernel[grid](...), as a call of the function itself, which has no num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.gpu import on_device
from tadperf.kernels.gpu.launch_configs import launch_config


@triton.jit
def block_sums_kernel(
    student_ptr,
    target_ptr,
    start_ptr,
    blocks_ptr,
    sums_ptr,
    n_blocks,
    student_stride,
    target_stride,
    start_stride,
    BLOCK: tl.constexpr,
):
    """Writes the two sums of squares of one block of one row to sums [B, blocks, 2]."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // n_blocks, program % n_blocks
    begin, end = tl.load(blocks_ptr + 3 * block), tl.load(blocks_ptr + 3 * block + 1)
    at = begin + tl.arange(0, BLOCK)
    inside = at < end
    s = tl.load(student_ptr + row * student_stride + at, mask=inside, other=0).to(tl.float32)
    t = tl.load(target_ptr + row * target_stride + at, mask=inside, other=0).to(tl.float32)
    u = tl.load(start_ptr + row * start_stride + at, mask=inside, other=0).to(tl.float32)
    tl.store(sums_ptr + 2 * program, tl.sum((s - t) * (s - t)))
    tl.store(sums_ptr + 2 * program + 1, tl.sum((u - t) * (u - t)))


@triton.jit
def segment_sums_kernel(
    sums_ptr, firsts_ptr, distance_ptr, expert_distance_ptr, ratio_ptr, n_blocks, n_segments, FOLD: tl.constexpr
):
    """Adds the sums of the blocks of one segment of one row in float64, and writes the three results."""
    program = tl.program_id(0).to(tl.int64)
    row, segment = program // n_segments, program % n_segments
    first, last = tl.load(firsts_ptr + segment), tl.load(firsts_ptr + segment + 1)
    d = tl.zeros((FOLD,), tl.float64)
    w = tl.zeros((FOLD,), tl.float64)
    for base in range(first, last, FOLD):
        block = base + tl.arange(0, FOLD)
        pair = sums_ptr + 2 * (row * n_blocks + block)
        d += tl.load(pair, mask=block < last, other=0).to(tl.float64)
        w += tl.load(pair + 1, mask=block < last, other=0).to(tl.float64)
    d_sum, w_sum = tl.sum(d), tl.sum(w)
    tl.store(distance_ptr + program, d_sum.to(tl.float32))
    tl.store(expert_distance_ptr + program, w_sum.to(tl.float32))
    tl.store(ratio_ptr + program, (d_sum / w_sum).to(tl.float32))


@triton.jit
def gradient_kernel(
    student_ptr, target_ptr, start_ptr, of_distance_ptr, of_expert_ptr, grad_student_ptr, grad_target_ptr,
    grad_start_ptr, blocks_ptr, n_blocks, n_segments, n_rows, student_stride, target_stride, start_stride,
    NEED_S: tl.constexpr, NEED_T: tl.constexpr, NEED_U: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of one block, for n_rows rows in order: 1, or all if a gradient is a sum over the rows.

    NEED_S, NEED_T, NEED_U: 0 if not needed, 1 for one gradient per row, 2 for the sum over the rows.
    """
    program = tl.program_id(0).to(tl.int64)
    first, block = program // n_blocks * n_rows, program % n_blocks
    begin, end, segment = (
        tl.load(blocks_ptr + 3 * block),
        tl.load(blocks_ptr + 3 * block + 1),
        tl.load(blocks_ptr + 3 * block + 2),
    )
    at = begin + tl.arange(0, BLOCK)
    inside = at < end
    sum_s = tl.zeros((BLOCK,), tl.float32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    sum_u = tl.zeros((BLOCK,), tl.float32)
    for i in range(n_rows):
        row = first + i
        t = tl.load(target_ptr + row * target_stride + at, mask=inside, other=0).to(tl.float32)
        g_s = tl.zeros((BLOCK,), tl.float32)
        g_u = tl.zeros((BLOCK,), tl.float32)
        if NEED_S + NEED_T > 0:
            s = tl.load(student_ptr + row * student_stride + at, mask=inside, other=0).to(tl.float32)
            g_s = tl.load(of_distance_ptr + row * n_segments + segment) * (s - t)
        if NEED_U + NEED_T > 0:
            u = tl.load(start_ptr + row * start_stride + at, mask=inside, other=0).to(tl.float32)
            g_u = tl.load(of_expert_ptr + row * n_segments + segment) * (u - t)
        if NEED_S == 1:
            tl.store(grad_student_ptr + row * student_stride + at, g_s, mask=inside)
        if NEED_T == 1:
            tl.store(grad_target_ptr + row * target_stride + at, -(g_s + g_u), mask=inside)
        if NEED_U == 1:
            tl.store(grad_start_ptr + row * start_stride + at, g_u, mask=inside)
        sum_s += g_s
        sum_t -= g_s + g_u
        sum_u += g_u
    if NEED_S == 2:
        tl.store(grad_student_ptr + at, sum_s, mask=inside)
    if NEED_T == 2:
        tl.store(grad_target_ptr + at, sum_t, mask=inside)
    if NEED_U == 2:
        tl.store(grad_start_ptr + at, sum_u, mask=inside)


@cache  # without a limit: a recorded CUDA graph may read a table again at any time
def _blocks(lengths: tuple[int, ...], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cuts the segments into blocks of at most `size` elements.

    Returns the blocks (begin, end, segment), int64 [blocks, 3], and the first block of each segment [S + 1].
    """
    blocks, firsts, begin = [], [0], 0
    for segment, length in enumerate(lengths):
        end = begin + length
        blocks += [(at, min(at + size, end), segment) for at in range(begin, end, size)]
        firsts.append(len(blocks))
        begin = end
    table = torch.tensor(blocks, dtype=torch.int64).view(-1, 3)
    return table.to(device), torch.tensor(firsts, device=device)


def _strides(*inputs: Tensor) -> list[int]:
    return [x.stride(0) if len(x) > 1 else 0 for x in inputs]


def trajectory_distance(student: Tensor, target: Tensor, start: Tensor, lengths: list[int]) -> list[Tensor]:
    """Returns the three results, float32 [B, S], for inputs [B or 1, P] with adjacent parameters.

    The first call with new lengths copies a table of blocks to the device. Make it before you capture a CUDA graph.
    """
    rows = next((len(x) for x in (student, target, start) if len(x) != 1), 1)
    config = launch_config("trajectory_distance", student.device, student.shape[1])
    size = config["block"]
    blocks, firsts = _blocks(tuple(lengths), size, student.device)
    count, segments = len(blocks), len(lengths)
    sums = student.new_empty((rows, count, 2), dtype=torch.float32)
    results = [sums.new_empty((rows, segments)) for _ in range(3)]
    if rows * segments == 0:
        return results
    strides = _strides(student, target, start)
    if count:
        with on_device(student):
            block_sums_kernel[(rows * count,)](
                student, target, start, blocks, sums, count, *strides, BLOCK=size, num_warps=config["num_warps"]
            )
    with on_device(student):
        segment_sums_kernel[(rows * segments,)](
            sums, firsts, *results, count, segments, FOLD=config["fold"], num_warps=1
        )
    return results


def gradient(
    student: Tensor,
    target: Tensor,
    start: Tensor,
    of_distance: Tensor,
    of_expert: Tensor,
    lengths: list[int],
    needs: list[bool],
) -> list[Tensor]:
    """Returns the gradients in the shape and type of their inputs; an empty tensor for each that is not needed."""
    inputs = (student, target, start)
    rows, segments = of_distance.shape
    config = launch_config("trajectory_distance", student.device, student.shape[1])
    size = config["gradient_block"]
    blocks, _ = _blocks(tuple(lengths), size, student.device)
    codes = [int(needed) * (2 if len(x) < rows else 1) for x, needed in zip(inputs, needs, strict=True)]
    inputs = [x.contiguous() for x in inputs]  # so that a gradient has the strides of its input
    grads = [torch.empty_like(x) if needed else x.new_empty(0) for x, needed in zip(inputs, needs, strict=True)]
    together = rows if 2 in codes else 1
    if len(blocks) and any(needs):
        with on_device(student):
            gradient_kernel[(len(blocks) * (rows // together),)](
                *inputs,
                of_distance,
                of_expert,
                *grads,
                blocks,
                len(blocks),
                segments,
                together,
                *_strides(*inputs),
                *codes,
                BLOCK=size,
                num_warps=config["num_warps"],
            )
    return grads
