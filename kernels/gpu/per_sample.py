"""Triton twin of per_sample: each program takes ROWS rows, in chunks of BLOCK classes.

Every lane keeps the running maximum, second maximum, argmax and sums of its own column of the chunks (the online
softmax, with one exponential per logit); lanes meet once, after the last chunk. The logits are read once.
"""

# Pyright takes a launch, kernel[grid](...), for a call of the function itself, which knows no num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.launch import launch
from tadperf.kernels.per_sample import PerSample, empty_results

INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))


@triton.jit
def first_logits(x, column):
    """The running state (top, second, argmax, sum, weighted) of lanes that have seen one logit each."""
    return x, tl.full(x.shape, -INF, tl.float32), column, tl.where(x == -INF, 0.0, 1.0), tl.zeros(x.shape, tl.float32)


@triton.jit
def next_logits(top, second, argmax, total, weighted, x, column):
    """The state after one more logit in each lane: total is of e = exp(x - top), and weighted of e * (x - top)."""
    higher = x > top  # strictly: of equals the first column stays
    d = tl.where((x == -INF) | (top == -INF), -INF, -tl.abs(x - top))
    e = tl.exp(d)
    de = tl.where(d == -INF, 0.0, d * e)
    weighted = tl.where(higher, weighted * e + total * de, weighted + de)
    total = tl.where(higher, total * e + 1, total + e)
    total = tl.where(x != x, x, total)
    second = tl.maximum(second, tl.minimum(x, top))
    return tl.where(higher, x, top), second, tl.where(higher, column, argmax), total, weighted


@triton.jit
def meet(top, second, argmax, total, weighted):
    """The states of all lanes of a row as one: each [ROWS, 1]."""
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
    picked,
    label,
    classes,
    loss,
    confidence,
    prediction,
    margin,
    entropy,
    at,
    mask,
):
    """The five results of rows from their final state; see tadperf.kernels.per_sample for what they mean."""
    defined = (total > 0) & (total < INF)
    log_total = tl.log(total)
    share = 1 / total
    value = tl.where(defined & (label < classes) & (label >= -1), log_total + (top - picked), NAN)
    tl.store(loss + at, tl.where(label == -1, 0.0, value), mask)
    tl.store(confidence + at, tl.where(defined, share, NAN), mask)
    tl.store(prediction + at, tl.where(defined, argmax, -1).to(tl.int64), mask)
    tl.store(margin + at, tl.where(defined, (1 - tl.exp(second - top)) * share, NAN), mask)
    tl.store(entropy + at, tl.where(defined, log_total - weighted * share, NAN), mask)


@triton.jit
def per_sample_kernel(
    logits, labels, loss, confidence, prediction, margin, entropy, rows, classes, stride, class_stride, label_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE_CHUNK: tl.constexpr,
):  # fmt: skip
    """All five results of ROWS rows a program, in one read of their logits."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    mask = row < rows
    at = logits + row * stride
    wide = column.to(tl.int64)
    x = tl.load(at + wide * class_stride, mask & (column < classes), other=-INF).to(tl.float32)
    columns = tl.zeros([ROWS, BLOCK], tl.int32) + column
    top, second, argmax, total, weighted = first_logits(x, columns)
    if not ONE_CHUNK:
        for begin in range(BLOCK, classes, BLOCK):
            here = mask & (column < classes - begin)
            x = tl.load(at + (wide + begin) * class_stride, here, other=-INF).to(tl.float32)
            top, second, argmax, total, weighted = next_logits(top, second, argmax, total, weighted, x, columns + begin)
    top, second, argmax, total, weighted = meet(top, second, argmax, total, weighted)
    label = tl.load(labels + row * label_stride, mask, other=-1).to(tl.int64)
    valid = mask & (label >= 0) & (label < classes)
    picked = tl.load(at + label * class_stride, valid, other=0).to(tl.float32)
    write_results(
        top, second, argmax, total, weighted, picked, label, classes,
        loss, confidence, prediction, margin, entropy, row, mask,
    )  # fmt: skip


@triton.jit
def loss_gradient_kernel(
    logits, labels, top, confidence, scale, out, rows, columns, first, classes, stride, class_stride, label_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(softmax - one-hot) times scale, a block of ROWS x BLOCK a program; 0 for ignored labels, NaN for wrong ones."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :].to(tl.int64)
    mask = row < rows
    here = mask & (column < columns)
    x = tl.load(logits + row * stride + column * class_stride, here, other=-INF).to(tl.float32)
    label = tl.load(labels + row * label_stride, mask, other=-1).to(tl.int64)
    wrong = (label < -1) | (label >= classes)
    p = tl.exp(x - tl.load(top + row, mask, other=0)) * tl.load(confidence + row, mask, other=0)
    gradient = (p - (column + first == label).to(tl.float32)) * tl.load(scale + row, mask, other=0)
    gradient = tl.where(label == -1, 0.0, tl.where(wrong, NAN, gradient))
    tl.store(out + row * columns + column, gradient.to(out.dtype.element_ty), here)


def per_sample(logits: Tensor, labels: Tensor) -> PerSample:
    """As tadperf.kernels.per_sample, for checked tensors [N, C] and [N]; reads the logits once."""
    rows, classes = logits.shape
    out = empty_results(labels)
    if rows == 0:
        return out
    how = launch("per_sample", logits.device, classes)
    block = min(how["block"], max(16, triton.next_power_of_2(classes)))
    per_program = max(1, how["tile"] // block)
    with torch.cuda.device_of(logits):
        per_sample_kernel[(triton.cdiv(rows, per_program),)](
            logits, labels, *out, rows, classes, *logits.stride(), labels.stride(0),
            ROWS=per_program, BLOCK=block, ONE_CHUNK=classes <= block, num_warps=how["num_warps"],
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
    """As tadperf.kernels.per_sample.loss_gradient; `classes` are those of all columns, where these are some."""
    rows, columns = logits.shape
    if rows == 0:
        return out
    how = launch("per_sample_gradient", logits.device, columns)
    block = min(how["block"], max(16, triton.next_power_of_2(columns)))
    per_program = max(1, how["tile"] // block)
    with torch.cuda.device_of(logits):
        loss_gradient_kernel[(triton.cdiv(rows, per_program), triton.cdiv(columns, block))](
            logits, labels, top, confidence, scale, out, rows, columns, first, classes or columns,
            *logits.stride(), labels.stride(0), ROWS=per_program, BLOCK=block, num_warps=how["num_warps"],
        )  # fmt: skip
    return out
