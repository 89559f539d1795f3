"""`per_sample_linear` in Triton: computes tiles of logits with tl.dot, reduces them and never stores them.

If there are few rows, several programs share the classes of a row (splits). A second kernel merges their states. The
number of splits depends on the shapes only, so every run gives the same bits.
"""

# Pyright reads a launch, kernel[grid](...), as a call of the function itself, which has no num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.gpu import MATMUL_PRECISION, on_device
from tadperf.kernels.gpu.launch_configs import launch_config
from tadperf.kernels.gpu.per_sample import INF, write_results
from tadperf.kernels.shared import empty_results

PROGRAMS = 512  # about four for each multiprocessor of an H100 or H200; not tuned
MAX_SPLITS = 64  # not tuned


@triton.jit
def linear_tile(
    features_ptr, weight_ptr, bias_ptr, row, column, n_rows, stop, n_features, feature_stride, weight_stride,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns logits [ROWS, BLOCK] in float32, and -inf in the columns from `stop` on."""
    x = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, n_features, DEPTH):
        k = begin + tl.arange(0, DEPTH).to(tl.int64)
        f = tl.load(
            features_ptr + row[:, None] * feature_stride + k[None, :],
            (row < n_rows)[:, None] & (k < n_features)[None, :],
            other=0,
        )
        w = tl.load(
            weight_ptr + column[None, :] * weight_stride + k[:, None],
            (column < stop)[None, :] & (k < n_features)[:, None],
            other=0,
        )
        x = tl.dot(f, w, x, input_precision=PRECISION)
    if HAS_BIAS:
        x += tl.load(bias_ptr + column, column < stop, other=0).to(tl.float32)[None, :]
    return tl.where((column < stop)[None, :], x, -INF)


@triton.jit
def add_tile(top, second, argmax, total, weighted, x, column):
    """Returns the state of each row [ROWS] after a tile of logits. See add_logits of per_sample."""
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
    features_ptr, weight_ptr, bias_ptr, labels_ptr, state_ptr, n_rows, n_classes, n_features,
    feature_stride, weight_stride, label_stride, per_split,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the six running values of ROWS rows over one split of the classes to state [splits, 6, rows]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    stop = tl.minimum(n_classes, (split + 1) * per_split)
    label = tl.load(labels_ptr + row * label_stride, row < n_rows, other=-1).to(tl.int64)
    top = tl.full([ROWS], -INF, tl.float32)
    second = tl.full([ROWS], -INF, tl.float32)
    argmax = tl.zeros([ROWS], tl.int32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    label_logit = tl.zeros([ROWS], tl.float32)
    for begin in range(split * per_split, stop, BLOCK):
        column = begin + tl.arange(0, BLOCK).to(tl.int64)
        x = linear_tile(
            features_ptr, weight_ptr, bias_ptr, row, column, n_rows, stop, n_features, feature_stride, weight_stride,
            HAS_BIAS, ROWS, BLOCK, DEPTH, PRECISION,
        )  # fmt: skip
        label_logit += tl.sum(tl.where(column[None, :] == label[:, None], x, 0.0), 1)
        top, second, argmax, total, weighted = add_tile(top, second, argmax, total, weighted, x, column)
    state = state_ptr + split * 6 * n_rows + row
    tl.store(state, top, row < n_rows)
    tl.store(state + n_rows, second, row < n_rows)
    tl.store(state + 2 * n_rows, argmax.to(tl.float32, bitcast=True), row < n_rows)
    tl.store(state + 3 * n_rows, total, row < n_rows)
    tl.store(state + 4 * n_rows, weighted, row < n_rows)
    tl.store(state + 5 * n_rows, label_logit, row < n_rows)


@triton.jit
def merge_splits(top, second, argmax, total, weighted):
    """Merges the states of all splits of a row. Each result is [ROWS, 1]."""
    row_top = tl.max(top, 1, keep_dims=True)
    row_argmax = tl.min(tl.where(top == row_top, argmax, 2147483647), 1, keep_dims=True)
    row_second = tl.max(tl.where(argmax == row_argmax, second, top), 1, keep_dims=True)
    drop = tl.where(top == -INF, 0.0, top - row_top)
    scale = tl.exp(drop)
    here = tl.where(scale == 0, 0.0, (weighted + total * drop) * scale)  # `drop` may be -inf
    row_weighted = tl.sum(here, 1, keep_dims=True)
    return row_top, row_second, row_argmax, tl.sum(total * scale, 1, keep_dims=True), row_weighted


@triton.jit
def merge_kernel(
    state_ptr, labels_ptr, loss_ptr, confidence_ptr, prediction_ptr, margin_ptr, entropy_ptr, tops_ptr,
    n_rows, n_classes, label_stride, n_splits,
    ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Writes the five results and the largest logit of ROWS rows per program, from the states of all splits."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    split = tl.arange(0, SPLITS)[None, :].to(tl.int64)
    mask = row < n_rows
    here = mask & (split < n_splits)
    state = state_ptr + split * 6 * n_rows + row
    top = tl.load(state, here, other=-INF)
    second = tl.load(state + n_rows, here, other=-INF)
    argmax = tl.load(state + 2 * n_rows, here, other=0).to(tl.int32, bitcast=True)
    total = tl.load(state + 3 * n_rows, here, other=0)
    weighted = tl.load(state + 4 * n_rows, here, other=0)
    label_logit = tl.sum(tl.load(state + 5 * n_rows, here, other=0), 1, keep_dims=True)
    label = tl.load(labels_ptr + row * label_stride, mask, other=-1).to(tl.int64)
    top, second, argmax, total, weighted = merge_splits(top, second, argmax, total, weighted)
    write_results(
        top, second, argmax, total, weighted, label_logit, label, n_classes,
        loss_ptr, confidence_ptr, prediction_ptr, margin_ptr, entropy_ptr, row, mask,
    )  # fmt: skip
    tl.store(tops_ptr + row, top, mask)


def per_sample_linear(features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Runs `tadperf.kernels.per_sample_linear` on checked tensors. The sixth result is the largest logit of a row."""
    (rows, depth), classes = features.shape, len(weight)
    out, top = empty_results(labels), labels.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return *out, top
    features, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (features, weight))
    bias = None if bias is None else bias.contiguous()
    config = launch_config("per_sample_linear", features.device, features.element_size())
    row_blocks, class_blocks = triton.cdiv(rows, config["rows"]), triton.cdiv(classes, config["block"])
    wanted = min(class_blocks, MAX_SPLITS, triton.cdiv(PROGRAMS, row_blocks))
    per_split = triton.cdiv(class_blocks, wanted) * config["block"]
    splits = triton.cdiv(classes, per_split)
    state = features.new_empty(splits, 6, rows, dtype=torch.float32)  # pyright: ignore[reportArgumentType]
    with on_device(features):
        linear_kernel[(row_blocks, splits)](
            features, weight, weight if bias is None else bias, labels, state, rows, classes, depth,
            features.stride(0), weight.stride(0), labels.stride(0), per_split,
            HAS_BIAS=bias is not None, ROWS=config["rows"], BLOCK=config["block"], DEPTH=config["depth"],
            PRECISION=MATMUL_PRECISION, num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
        padded = triton.next_power_of_2(splits)
        merge_rows = max(1, 512 // padded)
        merge_kernel[(triton.cdiv(rows, merge_rows),)](
            state,
            labels,
            *out,
            top,
            rows,
            classes,
            labels.stride(0),
            splits,
            ROWS=merge_rows,
            SPLITS=padded,
            num_warps=4,
        )
    return *out, top
