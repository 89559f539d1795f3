"""`reliability` in Triton: whitens the features in blocks of rows, then ranks them against tiles of anchors.

No program waits for another and no sum depends on the grid, so every run gives the same bits.
"""

# Pyright reads a launch, kernel[grid](...), as a call of the function itself, which has no num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.gpu import MATMUL_PRECISION, on_device
from tadperf.kernels.gpu.launch_configs import launch_config
from tadperf.kernels.shared import Reliability, centre_and_directions

# Whitened floats in memory at a time, 256 MB: with 2048 features 512 programs, about four for each multiprocessor of an
# H100. Not tuned.
BLOCK = 2**26


@triton.jit
def whiten_kernel(
    features_ptr,
    centre_ptr,
    inverse_ptr,
    out_ptr,
    n_rows,
    n_features,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes (features - centre) inverse' to out [N, D]. `inverse` is lower triangular: skips the tiles that are 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    column = (first + tl.arange(0, COLUMNS)).to(tl.int64)
    here = (row < n_rows)[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, tl.minimum(first + COLUMNS, n_features), INNER):
        at = (k + tl.arange(0, INNER)).to(tl.int64)
        inside = at < n_features
        z = tl.load(features_ptr + row[:, None] * row_stride + at[None, :] * column_stride, here & inside[None, :], 0.0)
        m = tl.load(centre_ptr + at, inside, 0.0)
        w = tl.load(
            inverse_ptr + column[None, :] * n_features + at[:, None],
            (column < n_features)[None, :] & inside[:, None],
            0.0,
        )
        total = tl.dot(z.to(tl.float32) - m[None, :], w, total, input_precision=PRECISION)
    tl.store(out_ptr + row[:, None] * n_features + column[None, :], total, here & (column < n_features)[None, :])


@triton.jit
def _tile_products(
    samples_ptr, anchors_ptr, row, column, n_rows, n_classes, n_features, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns the dot products of samples [ROWS] with anchors [COLUMNS]."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, n_features, INNER):
        at = (k + tl.arange(0, INNER)).to(tl.int64)
        inside = at < n_features
        s = tl.load(
            samples_ptr + row[:, None] * row_stride + at[None, :] * column_stride,
            (row < n_rows)[:, None] & inside[None, :],
            0.0,
        )
        a = tl.load(
            anchors_ptr + column[None, :] * n_features + at[:, None],
            (column < n_classes)[None, :] & inside[:, None],
            0.0,
        )
        total = tl.dot(s.to(tl.float32), a, total, input_precision=PRECISION)
    return total


@triton.jit
def _add_scores(score, first, best, best_class, second, second_class, COLUMNS: tl.constexpr):
    """Returns the best two classes of each row after one more tile. The lowest class wins a tie, NaN never wins."""
    score = tl.where(score == score, score, -float("inf"))
    # return_indices gives the lowest index among equals
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
    """Returns product / sqrt(square), clamped to -1..1; NaN if the square overflows."""
    length = tl.sqrt_rn(tl.where(square > 0, square, 1.0))
    length = tl.where(square < float("inf"), length, float("nan"))
    return tl.minimum(tl.maximum(product / length, -1.0, tl.PropagateNan.ALL), 1.0, tl.PropagateNan.ALL)


@triton.jit
def _exact(s, anchors_ptr, index, at, n_features, valid, DISTANCE: tl.constexpr):
    """Returns the sums over a tile of (s - a)^2, or of s a, where each row has its own anchor a."""
    a = tl.load(anchors_ptr + tl.maximum(index, 0).to(tl.int64)[:, None] * n_features + at[None, :], valid, 0.0)
    return tl.sum((s - a) * (s - a) if DISTANCE else s * a, 1)


@triton.jit
def _store(index_ptr, value_ptr, row, n_rows, index, value):
    """Writes classes and values; -1 and NaN if there is none."""
    defined = (index >= 0) & (tl.abs(value) < float("inf"))
    tl.store(index_ptr + row, tl.where(defined, index, -1).to(tl.int64), row < n_rows)
    tl.store(value_ptr + row, tl.where(defined, value, float("nan")), row < n_rows)


@triton.jit
def rank_kernel(
    samples_ptr, anchors_ptr, offsets_ptr, first_ptr, first_value_ptr, second_ptr, second_value_ptr,
    n_rows, n_classes, n_features, row_stride, column_stride, DISTANCE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the two best anchors of each sample and their values.

    The score is s'a - offset, or 2 s'a - offset with DISTANCE, where offset is |a|^2.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    best, second = tl.full((ROWS,), -float("inf"), tl.float32), tl.full((ROWS,), -float("inf"), tl.float32)
    best_class, second_class = tl.full((ROWS,), -1, tl.int32), tl.full((ROWS,), -1, tl.int32)
    for c in range(0, n_classes, COLUMNS):
        column = (c + tl.arange(0, COLUMNS)).to(tl.int64)
        score = _tile_products(
            samples_ptr, anchors_ptr, row, column, n_rows, n_classes, n_features, row_stride, column_stride,
            ROWS, COLUMNS, INNER, PRECISION,
        )  # fmt: skip
        offset = tl.load(offsets_ptr + column, column < n_classes, float("nan"))
        score = (2 * score if DISTANCE else score) - offset[None, :]
        best, best_class, second, second_class = _add_scores(score, c, best, best_class, second, second_class, COLUMNS)
    value, second_value = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for k in range(0, n_features, INNER):
        at = (k + tl.arange(0, INNER)).to(tl.int64)
        valid = (row < n_rows)[:, None] & (at < n_features)[None, :]
        s = tl.load(samples_ptr + row[:, None] * row_stride + at[None, :] * column_stride, valid, 0.0).to(tl.float32)
        value += _exact(s, anchors_ptr, best_class, at, n_features, valid, DISTANCE)
        second_value += _exact(s, anchors_ptr, second_class, at, n_features, valid, DISTANCE)
        square += tl.sum(s * s, 1)
    if DISTANCE:
        second_value = tl.where(second_class >= 0, second_value, float("inf"))
        swap = (second_value < value) | ((second_value == value) & (second_class < best_class))
        value, second_value = tl.where(swap, second_value, value), tl.where(swap, value, second_value)
        best_class, second_class = tl.where(swap, second_class, best_class), tl.where(swap, best_class, second_class)
        value, second_value = tl.sqrt_rn(value), tl.sqrt_rn(second_value)
    else:
        value, second_value = _cosine(value, square), _cosine(second_value, square)
    _store(first_ptr, first_value_ptr, row, n_rows, best_class, value)
    _store(second_ptr, second_value_ptr, row, n_rows, second_class, second_value)


def _whiten(features: Tensor, centre: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    rows, width = features.shape
    config: Any = launch_config("reliability_whiten", features.device, width)
    precision: Any = {"PRECISION": MATMUL_PRECISION}
    grid = triton.cdiv(rows, config["ROWS"]), triton.cdiv(width, config["COLUMNS"])
    with on_device(features):
        whiten_kernel[grid](
            features,
            centre,
            inverse,
            out,
            rows,
            width,
            features.stride(0),
            features.stride(1),
            **config,
            **precision,
        )
    return out[:rows]


def _rank(samples: Tensor, anchors: Tensor, offsets: Tensor, out: tuple[Tensor, ...], distance: bool) -> None:
    (rows, width), classes = samples.shape, len(anchors)
    config = launch_config("reliability", samples.device, classes)
    with on_device(samples):
        rank_kernel[(triton.cdiv(rows, config["ROWS"]),)](
            samples,
            anchors,
            offsets,
            *out,
            rows,
            classes,
            width,
            samples.stride(0),
            samples.stride(1),
            DISTANCE=distance,
            PRECISION=MATMUL_PRECISION,
            **config,
        )


def reliability(features: Tensor, anchors: Tensor, cholesky: Tensor) -> Reliability:
    """Runs `tadperf.kernels.reliability` on checked features [N, D] of float32, bfloat16 or float16."""
    (rows, width), device = features.shape, features.device
    centre, directions = centre_and_directions(anchors, torch.float32)
    identity = torch.eye(width, dtype=torch.float64, device=device)
    inverse = torch.linalg.solve_triangular(cholesky.double(), identity, upper=False).float().contiguous()
    whitened = _whiten(anchors.float(), centre, inverse, torch.empty_like(directions))
    usable = directions[:, 0] * 0  # NaN for anchors that are not finite, else 0
    squares = whitened.square().sum(-1) + usable
    out = Reliability(*(torch.empty(rows, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32) * 4))
    step = max(1, BLOCK // width)
    buffer = torch.empty(min(step, rows), width, dtype=torch.float32, device=device)
    for begin in range(0, rows, step):
        block, results = features[begin : begin + step], [result[begin : begin + step] for result in out]
        _rank(block, directions, usable, tuple(results[4:]), distance=False)
        _rank(_whiten(block, centre, inverse, buffer), whitened, squares, tuple(results[:4]), distance=True)
    return out
