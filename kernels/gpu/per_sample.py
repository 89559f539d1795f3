"""`per_sample` in Triton: each program handles ROWS rows, in chunks of BLOCK classes.

Each lane handles one column of every chunk. It keeps a running maximum, second maximum, argmax and sums (the online
softmax, with one exponential per logit). The lanes are merged once, after the last chunk. The logits are read once.
"""

# Pyright reads a launch, kernel[grid](...), as a call of the function itself, which has no num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.gpu import on_device
from tadperf.kernels.gpu.launch_configs import launch_config
from tadperf.kernels.shared import PerSample, empty_results

# NaN must not be a constant like this: Triton compares the constants of a kernel before each launch, and NaN != NaN.
INF = tl.constexpr(float("inf"))


@triton.jit
def first_logits(x, column):
    """Returns the running state (top, second, argmax, total, weighted) of lanes after their first logit."""
    return x, tl.full(x.shape, -INF, tl.float32), column, tl.where(x == -INF, 0.0, 1.0), tl.zeros(x.shape, tl.float32)


@triton.jit
def next_logits(top, second, argmax, total, weighted, x, column):
    """Returns the state after one more logit. total adds up e = exp(x - top), weighted e * (x - top)."""
    higher = x > top  # strictly higher: the first column of equal logits stays
    d = tl.where((x == -INF) | (top == -INF), -INF, -tl.abs(x - top))
    e = tl.exp(d)
    de = tl.where(d == -INF, 0.0, d * e)
    weighted = tl.where(higher, weighted * e + total * de, weighted + de)
    total = tl.where(higher, total * e + 1, total + e)
    total = tl.where(x != x, x, total)
    second = tl.maximum(second, tl.minimum(x, top))
    return tl.where(higher, x, top), second, tl.where(higher, column, argmax), total, weighted


@triton.jit
def merge_lanes(top, second, argmax, total, weighted):
    """Merges the states of all lanes of a row. Each result is [ROWS, 1]."""
    row_top = tl.max(top, 1, keep_dims=True)
    row_argmax = tl.min(tl.where(top == row_top, argmax, 2147483647), 1, keep_dims=True)
    row_second = tl.max(tl.where(argmax == row_argmax, second, top), 1, keep_dims=True)
    drop = tl.where(top == -INF, 0.0, top - row_top)
    scale = tl.exp(drop)
    here = tl.where(scale == 0, 0.0, (weighted + total * drop) * scale)  # `drop` may be -inf
    row_weighted = tl.sum(here, 1, keep_dims=True)
    return row_top, row_second, row_argmax, tl.sum(total * scale, 1, keep_dims=True), row_weighted


@triton.jit
def write_results(
    top,
    second,
    argmax,
    total,
    weighted,
    label_logit,
    label,
    n_classes,
    loss_ptr,
    confidence_ptr,
    prediction_ptr,
    margin_ptr,
    entropy_ptr,
    row,
    mask,
):
    """Writes the five results of rows, given their final state. tadperf.kernels.ops.per_sample defines them."""
    defined = (total > 0) & (total < INF)
    log_total = tl.log(total)
    share = 1 / total
    value = tl.where(defined & (label < n_classes) & (label >= -1), log_total + (top - label_logit), float("nan"))
    tl.store(loss_ptr + row, tl.where(label == -1, 0.0, value), mask)
    tl.store(confidence_ptr + row, tl.where(defined, share, float("nan")), mask)
    tl.store(prediction_ptr + row, tl.where(defined, argmax, -1).to(tl.int64), mask)
    tl.store(margin_ptr + row, tl.where(defined, (1 - tl.exp(second - top)) * share, float("nan")), mask)
    tl.store(entropy_ptr + row, tl.where(defined, log_total - weighted * share, float("nan")), mask)


@triton.jit
def per_sample_kernel(
    logits_ptr, labels_ptr, loss_ptr, confidence_ptr, prediction_ptr, margin_ptr, entropy_ptr,
    n_rows, n_classes, row_stride, class_stride, label_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE_CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes all five results of ROWS rows per program, in one read of their logits."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    mask = row < n_rows
    row_ptrs = logits_ptr + row * row_stride
    column64 = column.to(tl.int64)
    x = tl.load(row_ptrs + column64 * class_stride, mask & (column < n_classes), other=-INF).to(tl.float32)
    columns = tl.zeros([ROWS, BLOCK], tl.int32) + column
    top, second, argmax, total, weighted = first_logits(x, columns)
    if not ONE_CHUNK:
        for begin in range(BLOCK, n_classes, BLOCK):
            here = mask & (column < n_classes - begin)
            x = tl.load(row_ptrs + (column64 + begin) * class_stride, here, other=-INF).to(tl.float32)
            top, second, argmax, total, weighted = next_logits(top, second, argmax, total, weighted, x, columns + begin)
    top, second, argmax, total, weighted = merge_lanes(top, second, argmax, total, weighted)
    label = tl.load(labels_ptr + row * label_stride, mask, other=-1).to(tl.int64)
    valid = mask & (label >= 0) & (label < n_classes)
    label_logit = tl.load(row_ptrs + label * class_stride, valid, other=0).to(tl.float32)
    write_results(
        top, second, argmax, total, weighted, label_logit, label, n_classes,
        loss_ptr, confidence_ptr, prediction_ptr, margin_ptr, entropy_ptr, row, mask,
    )  # fmt: skip


@triton.jit
def loss_gradient_kernel(
    logits_ptr, labels_ptr, top_ptr, confidence_ptr, scale_ptr, out_ptr,
    n_rows, n_columns, first, n_classes, row_stride, class_stride, label_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes (softmax - one-hot) * scale, ROWS x BLOCK per program; 0 if ignored, NaN for a label out of range."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :].to(tl.int64)
    mask = row < n_rows
    here = mask & (column < n_columns)
    x = tl.load(logits_ptr + row * row_stride + column * class_stride, here, other=-INF).to(tl.float32)
    label = tl.load(labels_ptr + row * label_stride, mask, other=-1).to(tl.int64)
    wrong = (label < -1) | (label >= n_classes)
    p = tl.exp(x - tl.load(top_ptr + row, mask, other=0)) * tl.load(confidence_ptr + row, mask, other=0)
    gradient = (p - (column + first == label).to(tl.float32)) * tl.load(scale_ptr + row, mask, other=0)
    gradient = tl.where(label == -1, 0.0, tl.where(wrong, float("nan"), gradient))
    tl.store(out_ptr + row * n_columns + column, gradient.to(out_ptr.dtype.element_ty), here)


def per_sample(logits: Tensor, labels: Tensor) -> PerSample:
    """Runs `tadperf.kernels.per_sample` on checked tensors [N, C] and [N]. Reads the logits once."""
    rows, classes = logits.shape
    out = empty_results(labels)
    if rows == 0:
        return out
    config = launch_config("per_sample", logits.device, classes)
    block = min(config["block"], max(16, triton.next_power_of_2(classes)))
    per_program = max(1, config["tile"] // block)
    with on_device(logits):
        per_sample_kernel[(triton.cdiv(rows, per_program),)](
            logits, labels, *out, rows, classes, *logits.stride(), labels.stride(0),
            ROWS=per_program, BLOCK=block, ONE_CHUNK=classes <= block, num_warps=config["num_warps"],
        )  # fmt: skip
    return out


def loss_gradient(
    logits: Tensor,
    labels: Tensor,
    top: Tensor,
    confidence: Tensor,
    scale: Tensor,
    out: Tensor,
    first: int = 0,
    classes: int | None = None,
) -> Tensor:
    """Runs `tadperf.kernels.ops.per_sample.loss_gradient` on checked tensors."""
    rows, columns = logits.shape
    if rows == 0:
        return out
    config = launch_config("per_sample_gradient", logits.device, columns)
    block = min(config["block"], max(16, triton.next_power_of_2(columns)))
    per_program = max(1, config["tile"] // block)
    with on_device(logits):
        loss_gradient_kernel[(triton.cdiv(rows, per_program), triton.cdiv(columns, block))](
            logits, labels, top, confidence, scale, out, rows, columns, first, classes or columns,
            *logits.stride(), labels.stride(0), ROWS=per_program, BLOCK=block, num_warps=config["num_warps"],
        )  # fmt: skip
    return out
