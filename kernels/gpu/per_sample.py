"""`per_sample` in Triton: each program handles ROWS rows, in chunks of STEPS x LANES classes. Reads the logits once.

A row has LANES threads, and a program has exactly ROWS x LANES threads. So a thread holds one class of each step, keeps
its own state over the steps, and the threads of a row exchange values once a chunk. Any Triton version lays out such
tiles in the same way. (Tiles [STEPS, ROWS, LANES] took 15.3 ms for 1 280 000 x 1000 logits with Triton 3.6 on an H100,
because the threads of several warps shared a row; see bench/results/gpu.md.) The chunks of a long row are merged by the
online softmax.
"""

# Pyright reads a launch, kernel[grid](...), as a call of the function itself, which has no num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.gpu import on_device
from tadperf.kernels.gpu.launch_configs import launch_config
from tadperf.kernels.shared import PerSample, empty_results

# NaN must not be a constant like this: Triton compares the constants of a kernel before each launch, and NaN != NaN.
INF = tl.constexpr(float("inf"))


@triton.jit
def add_logits(top, second, argmax, total, weighted, logits, columns, STEPS: tl.constexpr):
    """Returns the state of each row after a chunk: tuples of STEPS tiles [ROWS, LANES], of logits and of their classes.

    With e = exp(x - top), total is the sum of e and weighted that of e * (x - top). A row of -inf has total 0.
    """
    best, next_best, where = logits[0], tl.full(logits[0].shape, -INF, tl.float32), columns[0]
    for step in tl.static_range(1, STEPS):  # pyright: ignore[reportGeneralTypeIssues]
        x = logits[step]
        next_best = tl.maximum(next_best, tl.minimum(best, x))
        where = tl.where(x > best, columns[step], where)
        best = tl.maximum(best, x)
    here = tl.max(best, 1)
    here_argmax = tl.min(tl.where(best == here[:, None], where, 2147483647), 1)  # the first of equal logits
    here_second = tl.max(tl.where(where == here_argmax[:, None], next_best, best), 1)
    second = tl.maximum(tl.maximum(second, here_second), tl.minimum(top, here))
    argmax = tl.where(here > top, here_argmax, argmax)
    new_top = tl.maximum(top, here)
    base = tl.where(new_top == -INF, 0.0, new_top)
    drop = tl.where(top == -INF, 0.0, top - base)
    scale = tl.exp(drop)
    weighted = tl.where(scale == 0, 0.0, (weighted + total * drop) * scale)  # `drop` may be -inf
    part, weighted_part = tl.zeros(logits[0].shape, tl.float32), tl.zeros(logits[0].shape, tl.float32)
    for step in tl.static_range(STEPS):
        d = logits[step] - base[:, None]
        e = tl.exp(d)
        part += e
        weighted_part += e * tl.maximum(d, -1e30)  # a class of probability 0 adds 0
    return new_top, second, argmax, total * scale + tl.sum(part, 1), weighted + tl.sum(weighted_part, 1)


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
    ROWS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, ONE_CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes all five results of ROWS rows per program, in one read of their logits."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n_rows
    row_ptrs = logits_ptr + row * row_stride
    label = tl.load(labels_ptr + row * label_stride, mask, other=-1).to(tl.int64)
    valid = mask & (label >= 0) & (label < n_classes)
    label_logit = tl.load(row_ptrs + label * class_stride, valid, other=0).to(tl.float32)
    lane = tl.arange(0, LANES)[None, :]
    top, second = tl.full([ROWS], -INF, tl.float32), tl.full([ROWS], -INF, tl.float32)
    total, weighted = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    argmax = tl.zeros([ROWS], tl.int32)
    for begin in range(0, STEPS * LANES if ONE_CHUNK else n_classes, STEPS * LANES):
        logits, columns = (), ()
        for step in tl.static_range(STEPS):
            column = begin + step * LANES + lane
            x_ptrs = row_ptrs[:, None] + column.to(tl.int64) * class_stride
            x = tl.load(x_ptrs, mask[:, None] & (column < n_classes), other=-INF)
            logits += (x.to(tl.float32),)
            columns += (column,)
        top, second, argmax, total, weighted = add_logits(top, second, argmax, total, weighted, logits, columns, STEPS)
    write_results(
        top, second, argmax, total, weighted, label_logit, label, n_classes,
        loss_ptr, confidence_ptr, prediction_ptr, margin_ptr, entropy_ptr, row, mask,
    )  # fmt: skip


@triton.jit
def loss_gradient_kernel(
    logits_ptr, labels_ptr, top_ptr, confidence_ptr, scale_ptr, out_ptr,
    n_rows, column_vectors, first, n_classes, row_vectors, class_stride, label_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes (softmax - one-hot) * scale, ROWS x BLOCK per program; 0 if ignored, NaN for a label out of range."""
    n_columns = column_vectors * VECTOR
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = row < n_rows
    here = mask & (column < n_columns)
    x_ptrs = logits_ptr + row * row_vectors * VECTOR + column.to(tl.int64) * class_stride
    x = tl.load(x_ptrs, here, other=-INF).to(tl.float32)
    label = tl.load(labels_ptr + row * label_stride, mask, other=-1).to(tl.int64)
    wrong = (label < -1) | (label >= n_classes)
    p = tl.exp(x - tl.load(top_ptr + row, mask, other=0)) * tl.load(confidence_ptr + row, mask, other=0)
    gradient = (p - (column + first == label).to(tl.float32)) * tl.load(scale_ptr + row, mask, other=0)
    gradient = tl.where(label == -1, 0.0, tl.where(wrong, float("nan"), gradient))
    tl.store(out_ptr + row * n_columns + column, gradient.to(out_ptr.dtype.element_ty), here)


def vector_size(x: Tensor) -> int:
    """Returns how many adjacent elements of x [N, C] one instruction can load: a power of two, at most 16 bytes.

    Triton knows of a number only whether it is a multiple of 16. The kernels get numbers divided by the vector size and
    multiply them, so that Triton knows this factor, too.
    """
    if x.stride(1) != 1 or x.data_ptr() % 16:
        return 1
    return math.gcd(16 // x.element_size(), x.shape[1], x.stride(0))


def per_sample(logits: Tensor, labels: Tensor) -> PerSample:
    """Runs `tadperf.kernels.per_sample` on checked tensors [N, C] and [N]. Reads the logits once."""
    rows, classes = logits.shape
    out = empty_results(labels)
    if rows == 0:
        return out
    config = launch_config("per_sample", logits.device, classes)
    lanes = min(32, triton.next_power_of_2(triton.cdiv(classes, config["values"])))  # of a row, in one warp
    steps = min(triton.cdiv(classes, lanes), config["values"])
    per_program = 32 * config["num_warps"] // lanes
    with on_device(logits):
        per_sample_kernel[(triton.cdiv(rows, per_program),)](
            logits, labels, *out, rows, classes, *logits.stride(), labels.stride(0),
            ROWS=per_program, STEPS=steps, LANES=lanes, ONE_CHUNK=classes <= steps * lanes,
            num_warps=config["num_warps"],
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
    vector = math.gcd(vector_size(logits), vector_size(out))
    block = min(config["block"], max(16, triton.next_power_of_2(columns)))
    per_program = max(1, config["tile"] // block)
    with on_device(logits):
        loss_gradient_kernel[(triton.cdiv(rows, per_program), triton.cdiv(columns, block))](
            logits, labels, top, confidence, scale, out, rows, columns // vector, first, classes or columns,
            logits.stride(0) // vector, logits.stride(1), labels.stride(0),
            ROWS=per_program, BLOCK=block, VECTOR=vector, num_warps=config["num_warps"],
        )  # fmt: skip
    return out
