"""`reliability` on CUDA tensors: features are whitened in blocks of rows, then ranked against tiles of anchors.

Products run on tensor cores as three TF32 products each (float32's accuracy), on AMD in float32 itself, whatever
torch's switches for TF32 say. No program waits for another and no sum depends on the grid: every run gives the same
bits.
"""

# Pyright takes a launch, kernel[grid](...), for a call of the function itself, which knows no num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.launch import launch
from tadperf.kernels.reliability import Reliability, centre_and_directions

PRECISION = "ieee" if torch.version.hip else "tf32x3"
BLOCK = 2**23  # whitened floats held at a time: 32 MB


@triton.jit
def whiten_kernel(
    features, centre, inverse, out, rows, width, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [rows, width] = (features - centre) inverse', inverse lower triangular: tiles above it are skipped."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    column = (first + tl.arange(0, COLUMNS)).to(tl.int64)
    here = (row < rows)[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, tl.minimum(first + COLUMNS, width), INNER):
        at = (k + tl.arange(0, INNER)).to(tl.int64)
        inside = at < width
        z = tl.load(features + row[:, None] * row_stride + at[None, :] * column_stride, here & inside[None, :], 0.0)
        m = tl.load(centre + at, inside, 0.0)
        w = tl.load(inverse + column[None, :] * width + at[:, None], (column < width)[None, :] & inside[:, None], 0.0)
        total = tl.dot(z.to(tl.float32) - m[None, :], w, total, input_precision=PRECISION)
    tl.store(out + row[:, None] * width + column[None, :], total, here & (column < width)[None, :])


@triton.jit
def _tile_products(
    samples, anchors, row, column, rows, classes, width, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, width, INNER):
        at = (k + tl.arange(0, INNER)).to(tl.int64)
        inside = at < width
        s = tl.load(
            samples + row[:, None] * row_stride + at[None, :] * column_stride,
            (row < rows)[:, None] & inside[None, :], 0.0,
        )  # fmt: skip
        a = tl.load(anchors + column[None, :] * width + at[:, None], (column < classes)[None, :] & inside[:, None], 0.0)
        total = tl.dot(s.to(tl.float32), a, total, input_precision=PRECISION)
    return total


@triton.jit
def _see(score, first, best, best_class, second, second_class, COLUMNS: tl.constexpr):
    """The best two of each row, after one more tile of scores; of equals the lowest class, NaN never."""
    score = tl.where(score == score, score, -float("inf"))
    # the lowest of equals
    top, place = tl.max(score, 1, return_indices=True)  # pyright: ignore[reportGeneralTypeIssues]
    score = tl.where(tl.arange(0, COLUMNS)[None, :] == place[:, None], -float("inf"), score)
    next_top, next_place = tl.max(score, 1, return_indices=True)
    higher, next_higher = top > best, next_top > best
    second_class = tl.where(
        higher,
        tl.where(next_higher, first + next_place, best_class),
        tl.where(top > second, first + place, second_class),
    )
    second = tl.where(higher, tl.where(next_higher, next_top, best), tl.maximum(second, top))
    best_class = tl.where(higher, first + place, best_class)
    return tl.maximum(best, top), best_class, second, second_class


@triton.jit
def _cosine(product, square):
    length = tl.sqrt_rn(tl.where(square > 0, square, 1.0))
    length = tl.where(square < float("inf"), length, float("nan"))
    return tl.minimum(tl.maximum(product / length, -1.0, tl.PropagateNan.ALL), 1.0, tl.PropagateNan.ALL)


@triton.jit
def _exact(s, anchors, index, at, width, valid, DISTANCE: tl.constexpr):
    """Sum over a tile's columns of (s - a)^2, or of s a, where each row has an anchor of its own."""
    a = tl.load(anchors + tl.maximum(index, 0).to(tl.int64)[:, None] * width + at[None, :], valid, 0.0)
    return tl.sum((s - a) * (s - a) if DISTANCE else s * a, 1)


@triton.jit
def _store(index_out, value_out, row, rows, index, value):
    defined = (index >= 0) & (tl.abs(value) < float("inf"))
    tl.store(index_out + row, tl.where(defined, index, -1).to(tl.int64), row < rows)
    tl.store(value_out + row, tl.where(defined, value, float("nan")), row < rows)


@triton.jit
def rank_kernel(
    samples, anchors, offsets, first_out, first_value_out, second_out, second_value_out,
    rows, classes, width, row_stride, column_stride, DISTANCE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Two best anchors of each sample by s'a, or (DISTANCE) by 2 s'a - offset, with offset |a|^2; then their values."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    best, second = tl.full((ROWS,), -float("inf"), tl.float32), tl.full((ROWS,), -float("inf"), tl.float32)
    best_class, second_class = tl.full((ROWS,), -1, tl.int32), tl.full((ROWS,), -1, tl.int32)
    for c in range(0, classes, COLUMNS):
        column = (c + tl.arange(0, COLUMNS)).to(tl.int64)
        score = _tile_products(
            samples, anchors, row, column, rows, classes, width, row_stride, column_stride,
            ROWS, COLUMNS, INNER, PRECISION,
        )  # fmt: skip
        offset = tl.load(offsets + column, column < classes, float("nan"))
        score = (2 * score if DISTANCE else score) - offset[None, :]
        best, best_class, second, second_class = _see(score, c, best, best_class, second, second_class, COLUMNS)
    value, second_value = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for k in range(0, width, INNER):
        at = (k + tl.arange(0, INNER)).to(tl.int64)
        valid = (row < rows)[:, None] & (at < width)[None, :]
        s = tl.load(samples + row[:, None] * row_stride + at[None, :] * column_stride, valid, 0.0).to(tl.float32)
        value += _exact(s, anchors, best_class, at, width, valid, DISTANCE)
        second_value += _exact(s, anchors, second_class, at, width, valid, DISTANCE)
        square += tl.sum(s * s, 1)
    if DISTANCE:
        second_value = tl.where(second_class >= 0, second_value, float("inf"))
        swap = (second_value < value) | ((second_value == value) & (second_class < best_class))
        value, second_value = tl.where(swap, second_value, value), tl.where(swap, value, second_value)
        best_class, second_class = tl.where(swap, second_class, best_class), tl.where(swap, best_class, second_class)
        value, second_value = tl.sqrt_rn(value), tl.sqrt_rn(second_value)
    else:
        value, second_value = _cosine(value, square), _cosine(second_value, square)
    _store(first_out, first_value_out, row, rows, best_class, value)
    _store(second_out, second_value_out, row, rows, second_class, second_value)


def _whiten(features: Tensor, centre: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    rows, width = features.shape
    options = launch("reliability_whiten", features.device, width)
    grid = triton.cdiv(rows, options["ROWS"]), triton.cdiv(width, options["COLUMNS"])
    whiten_kernel[grid](
        features, centre, inverse, out, rows, width, features.stride(0), features.stride(1),
        PRECISION=PRECISION, **options,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    return out[:rows]


def _rank(samples: Tensor, anchors: Tensor, offsets: Tensor, out: tuple[Tensor, ...], distance: bool) -> None:
    (rows, width), classes = samples.shape, len(anchors)
    options = launch("reliability", samples.device, classes)
    rank_kernel[(triton.cdiv(rows, options["ROWS"]),)](
        samples, anchors, offsets, *out, rows, classes, width, samples.stride(0), samples.stride(1),
        DISTANCE=distance, PRECISION=PRECISION, **options,
    )  # fmt: skip


def reliability(features: Tensor, anchors: Tensor, cholesky: Tensor) -> Reliability:
    """`tadperf.kernels.reliability` for checked features [N, D] of float32, bfloat16 or float16."""
    (rows, width), device = features.shape, features.device
    centre, directions = centre_and_directions(anchors, torch.float32)
    identity = torch.eye(width, dtype=torch.float64, device=device)
    inverse = torch.linalg.solve_triangular(cholesky.double(), identity, upper=False).float().contiguous()
    whitened = _whiten(anchors.float(), centre, inverse, torch.empty_like(directions))
    usable = directions[:, 0] * 0  # NaN where an anchor is, else 0
    squares = whitened.square().sum(-1) + usable
    out = Reliability(*(torch.empty(rows, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32) * 4))
    step = max(1, BLOCK // width)
    buffer = torch.empty(min(step, rows), width, device=device)
    for begin in range(0, rows, step):
        block, results = features[begin : begin + step], [result[begin : begin + step] for result in out]
        _rank(block, directions, usable, tuple(results[4:]), distance=False)
        _rank(_whiten(block, centre, inverse, buffer), whitened, squares, tuple(results[:4]), distance=True)
    return out
