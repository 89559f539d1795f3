"""Triton twin of per_sample_linear: tiles of logits are made by tl.dot, looked at and forgotten.

The classes are shared out over `splits` programs where there are few rows; a second kernel joins what these found of
each row. How many splits there are depends on the shapes alone, so a result has the same bits in any run.
"""

# Pyright takes a launch, kernel[grid](...), for a call of the function itself, which knows no num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.gpu.per_sample import INF, meet, write_results
from tadperf.kernels.launch import launch
from tadperf.kernels.per_sample import empty_results

PROGRAMS = 512  # about four for each multiprocessor of an H100 or H200
SPLITS = 64  # at most


@triton.jit
def linear_tile(
    features, weight, bias, row, column, rows, stop, depth, f_stride, w_stride,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits [ROWS, BLOCK] in float32, -inf in columns from `stop` on."""
    x = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, depth, DEPTH):
        k = begin + tl.arange(0, DEPTH).to(tl.int64)
        f = tl.load(
            features + row[:, None] * f_stride + k[None, :],
            (row < rows)[:, None] & (k < depth)[None, :],
            other=0,
        )
        w = tl.load(
            weight + column[None, :] * w_stride + k[:, None],
            (column < stop)[None, :] & (k < depth)[:, None],
            other=0,
        )
        x = tl.dot(f, w, x, input_precision=PRECISION)
    if HAS_BIAS:
        x += tl.load(bias + column, column < stop, other=0).to(tl.float32)[None, :]
    return tl.where((column < stop)[None, :], x, -INF)


@triton.jit
def see_tile(top, second, argmax, total, weighted, x, column):
    """The state of each row after a tile of logits: each [ROWS]; see next_logits."""
    tile_top = tl.max(x, 1)
    columns = tl.broadcast_to(column.to(tl.int32)[None, :], x.shape)
    tile_argmax = tl.min(tl.where(x == tile_top[:, None], columns, 2147483647), 1)
    tile_second = tl.max(tl.where(columns == tile_argmax[:, None], -INF, x), 1)
    argmax = tl.where(tile_top > top, tile_argmax, argmax)
    second = tl.maximum(tl.maximum(second, tile_second), tl.minimum(top, tile_top))
    new_top = tl.maximum(top, tile_top)
    base = tl.where(new_top == -INF, 0.0, new_top)
    d = x - base[:, None]
    e = tl.exp(d)
    drop = tl.where(top == -INF, 0.0, top - base)
    scale = tl.exp(drop)
    weighted = tl.where(scale == 0, 0.0, (weighted + total * drop) * scale)  # `drop` may be -inf
    weighted += tl.sum(tl.where(d == -INF, 0.0, e * d), 1)
    total = total * scale + tl.sum(e, 1)
    return new_top, second, argmax, total, weighted


@triton.jit
def linear_kernel(
    features, weight, bias, labels, state, rows, classes, depth,
    f_stride, w_stride, label_stride, per_split,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one split of the classes says of ROWS rows: six running values each, into state."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    stop = tl.minimum(classes, (split + 1) * per_split)
    label = tl.load(labels + row * label_stride, row < rows, other=-1).to(tl.int64)
    top = tl.full([ROWS], -INF, tl.float32)
    second = tl.full([ROWS], -INF, tl.float32)
    argmax = tl.zeros([ROWS], tl.int32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    picked = tl.zeros([ROWS], tl.float32)
    for begin in range(split * per_split, stop, BLOCK):
        column = begin + tl.arange(0, BLOCK).to(tl.int64)
        x = linear_tile(
            features, weight, bias, row, column, rows, stop, depth, f_stride, w_stride,
            HAS_BIAS, ROWS, BLOCK, DEPTH, PRECISION,
        )  # fmt: skip
        picked += tl.sum(tl.where(column[None, :] == label[:, None], x, 0.0), 1)
        top, second, argmax, total, weighted = see_tile(top, second, argmax, total, weighted, x, column)
    at = state + split * 6 * rows + row
    tl.store(at, top, row < rows)
    tl.store(at + rows, second, row < rows)
    tl.store(at + 2 * rows, argmax.to(tl.float32, bitcast=True), row < rows)
    tl.store(at + 3 * rows, total, row < rows)
    tl.store(at + 4 * rows, weighted, row < rows)
    tl.store(at + 5 * rows, picked, row < rows)


@triton.jit
def join_kernel(
    state, labels, loss, confidence, prediction, margin, entropy, tops, rows, classes, label_stride, splits,
    ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The five results of ROWS rows a program, from the states of all splits."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    split = tl.arange(0, SPLITS)[None, :].to(tl.int64)
    mask = row < rows
    here = mask & (split < splits)
    at = state + split * 6 * rows + row
    top = tl.load(at, here, other=-INF)
    second = tl.load(at + rows, here, other=-INF)
    argmax = tl.load(at + 2 * rows, here, other=0).to(tl.int32, bitcast=True)
    total = tl.load(at + 3 * rows, here, other=0)
    weighted = tl.load(at + 4 * rows, here, other=0)
    picked = tl.sum(tl.load(at + 5 * rows, here, other=0), 1, keep_dims=True)
    label = tl.load(labels + row * label_stride, mask, other=-1).to(tl.int64)
    top, second, argmax, total, weighted = meet(top, second, argmax, total, weighted)
    write_results(
        top, second, argmax, total, weighted, picked, label, classes,
        loss, confidence, prediction, margin, entropy, row, mask,
    )  # fmt: skip
    tl.store(tops + row, top, mask)


def per_sample_linear(features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """tadperf.kernels.per_sample_linear for checked tensors, and a sixth result: the largest logit of each row."""
    (rows, depth), classes = features.shape, len(weight)
    out, top = empty_results(labels), labels.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return *out, top
    features, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (features, weight))
    bias = None if bias is None else bias.contiguous()
    how = launch("per_sample_linear", features.device, features.element_size())
    row_blocks, class_blocks = triton.cdiv(rows, how["rows"]), triton.cdiv(classes, how["block"])
    wanted = min(class_blocks, SPLITS, triton.cdiv(PROGRAMS, row_blocks))
    per_split = triton.cdiv(class_blocks, wanted) * how["block"]
    splits = triton.cdiv(classes, per_split)
    state = features.new_empty(splits, 6, rows, dtype=torch.float32)  # pyright: ignore[reportArgumentType]
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    with torch.cuda.device_of(features):
        linear_kernel[(row_blocks, splits)](
            features, weight, weight if bias is None else bias, labels, state, rows, classes, depth,
            features.stride(0), weight.stride(0), labels.stride(0), per_split,
            HAS_BIAS=bias is not None, ROWS=how["rows"], BLOCK=how["block"], DEPTH=how["depth"], PRECISION=precision,
            num_warps=how["num_warps"], num_stages=how["num_stages"],
        )  # fmt: skip
        padded = triton.next_power_of_2(splits)
        join_rows = max(1, 512 // padded)
        join_kernel[(triton.cdiv(rows, join_rows),)](
            state, labels, *out, top, rows, classes, labels.stride(0), splits,
            ROWS=join_rows, SPLITS=padded, num_warps=4,
        )  # fmt: skip
    return *out, top
