"""Triton twin of `trajectory_distance`: sums of blocks, folded in float64 by a second kernel; no atomics."""

# Pyright takes a launch, kernel[grid](...), for a call of the function itself, which knows no num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels import launch


@triton.jit
def block_sums(student, target, start, blocks, sums, count, stride_s, stride_t, stride_u, BLOCK: tl.constexpr):
    """One block of one row: its two sums of squares, to sums [B, blocks, 2]."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // count, program % count
    begin, end = tl.load(blocks + 3 * block), tl.load(blocks + 3 * block + 1)
    at = begin + tl.arange(0, BLOCK)
    inside = at < end
    s = tl.load(student + row * stride_s + at, mask=inside, other=0).to(tl.float32)
    t = tl.load(target + row * stride_t + at, mask=inside, other=0).to(tl.float32)
    u = tl.load(start + row * stride_u + at, mask=inside, other=0).to(tl.float32)
    tl.store(sums + 2 * program, tl.sum((s - t) * (s - t)))
    tl.store(sums + 2 * program + 1, tl.sum((u - t) * (u - t)))


@triton.jit
def fold(sums, firsts, distance, way, ratio, count, segments, FOLD: tl.constexpr):
    """One segment of one row: the sums of its blocks, in float64."""
    program = tl.program_id(0).to(tl.int64)
    row, segment = program // segments, program % segments
    first, last = tl.load(firsts + segment), tl.load(firsts + segment + 1)
    d = tl.zeros((FOLD,), tl.float64)
    w = tl.zeros((FOLD,), tl.float64)
    for base in range(first, last, FOLD):
        block = base + tl.arange(0, FOLD)
        pair = sums + 2 * (row * count + block)
        d += tl.load(pair, mask=block < last, other=0).to(tl.float64)
        w += tl.load(pair + 1, mask=block < last, other=0).to(tl.float64)
    d_sum, w_sum = tl.sum(d), tl.sum(w)
    tl.store(distance + program, d_sum.to(tl.float32))
    tl.store(way + program, w_sum.to(tl.float32))
    tl.store(ratio + program, (d_sum / w_sum).to(tl.float32))


@triton.jit
def gradients(
    student,
    target,
    start,
    of_distance,
    of_way,
    grad_student,
    grad_target,
    grad_start,
    blocks,
    count,
    segments,
    rows,  # of one program: 1, or all where a gradient sums over them
    stride_s,
    stride_t,
    stride_u,
    NEED_S: tl.constexpr,  # 0: not needed, 1: a gradient for each row, 2: their sum
    NEED_T: tl.constexpr,
    NEED_U: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row, or of all rows one after another."""
    program = tl.program_id(0).to(tl.int64)
    first, block = program // count * rows, program % count
    begin, end, segment = tl.load(blocks + 3 * block), tl.load(blocks + 3 * block + 1), tl.load(blocks + 3 * block + 2)
    at = begin + tl.arange(0, BLOCK)
    inside = at < end
    sum_s = tl.zeros((BLOCK,), tl.float32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    sum_u = tl.zeros((BLOCK,), tl.float32)
    for i in range(rows):
        row = first + i
        t = tl.load(target + row * stride_t + at, mask=inside, other=0).to(tl.float32)
        g_s = tl.zeros((BLOCK,), tl.float32)
        g_u = tl.zeros((BLOCK,), tl.float32)
        if NEED_S + NEED_T > 0:
            s = tl.load(student + row * stride_s + at, mask=inside, other=0).to(tl.float32)
            g_s = tl.load(of_distance + row * segments + segment) * (s - t)
        if NEED_U + NEED_T > 0:
            u = tl.load(start + row * stride_u + at, mask=inside, other=0).to(tl.float32)
            g_u = tl.load(of_way + row * segments + segment) * (u - t)
        if NEED_S == 1:
            tl.store(grad_student + row * stride_s + at, g_s, mask=inside)
        if NEED_T == 1:
            tl.store(grad_target + row * stride_t + at, -(g_s + g_u), mask=inside)
        if NEED_U == 1:
            tl.store(grad_start + row * stride_u + at, g_u, mask=inside)
        sum_s += g_s
        sum_t -= g_s + g_u
        sum_u += g_u
    if NEED_S == 2:
        tl.store(grad_student + at, sum_s, mask=inside)
    if NEED_T == 2:
        tl.store(grad_target + at, sum_t, mask=inside)
    if NEED_U == 2:
        tl.store(grad_start + at, sum_u, mask=inside)


@lru_cache(maxsize=64)
def _blocks(lengths: tuple[int, ...], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks (begin, end, segment) int64 [blocks, 3], none across a border, and the first of each segment [S + 1]."""
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
    """Distance, way and ratio, float32 [B, S], of inputs [B or 1, P] with adjacent parameters.

    The blocks of a tuple of lengths go to the device at its first use: before a CUDA graph is captured.
    """
    rows = next((len(x) for x in (student, target, start) if len(x) != 1), 1)
    options = launch.launch("trajectory_distance", student.device, student.shape[1])
    size = options["block"]
    blocks, firsts = _blocks(tuple(lengths), size, student.device)
    count, segments = len(blocks), len(lengths)
    sums = student.new_empty((rows, count, 2), dtype=torch.float32)
    results = [sums.new_empty((rows, segments)) for _ in range(3)]
    if rows * segments == 0:
        return results
    strides = _strides(student, target, start)
    if count:
        block_sums[(rows * count,)](
            student, target, start, blocks, sums, count, *strides, BLOCK=size, num_warps=options["num_warps"]
        )
    fold[(rows * segments,)](sums, firsts, *results, count, segments, FOLD=options["fold"], num_warps=1)
    return results


def gradient(
    student: Tensor,
    target: Tensor,
    start: Tensor,
    of_distance: Tensor,
    of_way: Tensor,
    lengths: list[int],
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that are needed, each in its input's shape and type; empty ones for the others."""
    inputs = (student, target, start)
    rows, segments = of_distance.shape
    options = launch.launch("trajectory_distance", student.device, student.shape[1])
    size = options["gradient_block"]
    blocks, _ = _blocks(tuple(lengths), size, student.device)
    codes = [int(needed) * (2 if len(x) < rows else 1) for x, needed in zip(inputs, needs, strict=True)]
    inputs = [x.contiguous() for x in inputs]  # so that a gradient has its input's strides
    grads = [torch.empty_like(x) if needed else x.new_empty(0) for x, needed in zip(inputs, needs, strict=True)]
    together = rows if 2 in codes else 1
    if len(blocks) and any(needs):
        gradients[(len(blocks) * (rows // together),)](
            *inputs,
            of_distance,
            of_way,
            *grads,
            blocks,
            len(blocks),
            segments,
            together,
            *_strides(*inputs),
            *codes,
            BLOCK=size,
            num_warps=options["num_warps"],
        )
    return grads
