"""`diverse_pick` in Triton: one program handles the anomalies of one class in order."""

# Pyright reads a launch, kernel[grid](...), as a call of the function itself, which has no num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.gpu import on_device
from tadperf.kernels.gpu.launch_configs import launch_config
from tadperf.kernels.shared import unit_rows


@triton.jit
def largest_cosines(
    row_ptrs, row_mask, units_ptr, others, other_mask, largest, n_features,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Returns `largest` [ROWS], updated with each unit row's cosines with the rows `others` of `units_ptr`."""
    cosines = tl.zeros((ROWS, OTHERS), tl.float32)
    for start in range(0, n_features, DEPTH):
        feature = start + tl.arange(0, DEPTH)
        inside = feature < n_features
        a = tl.load(row_ptrs[:, None] + feature[None, :], mask=row_mask[:, None] & inside[None, :], other=0)
        b_ptrs = units_ptr + others[None, :] * n_features + feature[:, None]
        b = tl.load(b_ptrs, mask=other_mask[None, :] & inside[:, None], other=0)
        cosines = tl.dot(a, b, cosines, input_precision="ieee")
    return tl.maximum(largest, tl.max(tl.where(other_mask[None, :], cosines, float("-inf")), 1))


@triton.jit
def best_candidate(
    anomaly, begin, end, first, place, units_ptr, scores_ptr, pooled_ptr, qualified_ptr, usable_ptr, rows_ptr, weight,
    n_candidates, n_features, ROWS: tl.constexpr, OTHERS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Returns the row and the similarity of the winner of one anomaly; the row is -1 if there is no winner.

    The class holds the qualified images begin..end, and the winners of the anomalies first..place.
    """
    best = tl.full((), -1, tl.int64)
    best_value = tl.full((), float("-inf"), tl.float64)
    similarity = tl.full((), float("nan"), tl.float32)
    for start in range(0, n_candidates, ROWS):
        candidate = start + tl.arange(0, ROWS)
        row = anomaly * n_candidates + candidate
        valid = candidate < n_candidates
        valid = valid & (tl.load(pooled_ptr + row, mask=valid, other=0) != 0)
        row_ptrs = units_ptr + row * n_features
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        for base in range(begin, end, OTHERS):
            other = base + tl.arange(0, OTHERS)
            usable = tl.load(usable_ptr + other, mask=other < end, other=0) != 0
            largest = largest_cosines(
                row_ptrs, valid, qualified_ptr, other, usable, largest, n_features, ROWS, OTHERS, DEPTH
            )
        for base in range(first, place, OTHERS):
            winner = base + tl.arange(0, OTHERS)
            other = tl.load(rows_ptr + winner, mask=winner < place, other=-1)
            largest = largest_cosines(
                row_ptrs, valid, units_ptr, tl.maximum(other, 0), other >= 0, largest, n_features, ROWS, OTHERS, DEPTH
            )
        score = tl.load(scores_ptr + row, mask=valid, other=float("-inf"))
        distance = 1 - largest.to(tl.float64)
        value = tl.where(weight != weight, distance, score + weight * distance)
        empty_class = tl.max(largest) == float("-inf")
        value = tl.where(valid, tl.where(empty_class, score, value), float("-inf"))
        highest = tl.max(value)
        lowest_row = tl.min(tl.where(value == highest, row, row + ROWS))  # among equal values
        better = highest > best_value
        best = tl.where(better, lowest_row, best)
        similarity = tl.where(better, tl.max(tl.where(row == lowest_row, largest, float("-inf"))), similarity)
        best_value = tl.where(better, highest, best_value)
    return best, similarity


@triton.jit
def diverse_pick_kernel(
    units_ptr,  # unit rows of the candidates, float32 [A, K, D]
    scores_ptr,  # float64 [A, K]; -inf and NaN never win
    pooled_ptr,  # int8 [A, K]: whether a candidate is in the pool
    order_ptr,  # int64 [A]: anomalies sorted by class, and by index within a class
    classes_ptr,  # int64 [A], sorted
    qualified_ptr,  # unit rows, float32 [Q, D], sorted by class
    usable_ptr,  # int8 [Q]
    begins_ptr,  # int64 [A]: where the qualified images of the class begin
    ends_ptr,  # int64 [A]: where they end
    rows_ptr,  # int64 [A], in sorted order: row of the winner, -1 if there is none
    index_ptr,
    similarity_ptr,
    weight_ptr,  # float64 [1]; NaN ignores the score
    n_anomalies,
    n_candidates,
    n_features,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Handles all anomalies of a class, if anomaly `program_id` is the first of its class. Otherwise does nothing."""
    first = tl.program_id(0).to(tl.int64)
    label = tl.load(classes_ptr + first)
    if tl.load(classes_ptr + first - 1, mask=first > 0, other=label - 1) != label:
        begin, end, weight = tl.load(begins_ptr + first), tl.load(ends_ptr + first), tl.load(weight_ptr)
        place = first
        same_class = True
        while same_class:
            anomaly = tl.load(order_ptr + place)
            best, similarity = best_candidate(  # pyright: ignore[reportGeneralTypeIssues]
                anomaly, begin, end, first, place, units_ptr, scores_ptr, pooled_ptr, qualified_ptr, usable_ptr,
                rows_ptr, weight, n_candidates, n_features, ROWS, OTHERS, DEPTH,
            )  # fmt: skip
            tl.store(index_ptr + anomaly, tl.where(best < 0, best, best - anomaly * n_candidates))
            tl.store(similarity_ptr + anomaly, similarity)
            tl.store(rows_ptr + place, best)
            tl.debug_barrier()  # other threads of this program read the row for the next anomaly
            place += 1
            same_class = tl.load(classes_ptr + place, mask=place < n_anomalies, other=label - 1) == label


def _pool(scores: Tensor, usable: Tensor, top_k: int | None) -> Tensor:
    """Returns bool [A, K]: the top_k usable candidates by score. Among equal scores the lower index comes first."""
    usable = usable & (scores > -math.inf)
    if top_k is None or top_k >= scores.shape[1]:
        return usable
    ranked = torch.where(usable, scores, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(usable).scatter_(-1, ranked[:, :top_k], True) & usable


def diverse_pick(
    candidates: Tensor,
    scores: Tensor,
    qualified: Tensor,
    classes: Tensor,
    qualified_classes: Tensor,
    top_k: int | None,
    weight: float | None,
) -> tuple[Tensor, Tensor]:
    """Returns index and similarity [A]. A, K and D must be 1 or more."""
    count, choices, size = candidates.shape
    units, usable = unit_rows(candidates)
    scores = scores.double().contiguous()
    pooled = _pool(scores, usable, top_k)
    sorted_classes, order = classes.long().sort(stable=True)
    held, held_order = qualified_classes.long().sort(stable=True)
    held_units, held_usable = unit_rows(qualified[held_order])
    index, rows = torch.empty_like(order), torch.empty_like(order)
    similarity = units.new_empty(count)
    config = launch_config("diverse_pick", candidates.device, choices)
    with on_device(candidates):
        diverse_pick_kernel[(count,)](
            units.contiguous(),
            scores,
            pooled.to(torch.int8),
            order,
            sorted_classes,
            held_units.contiguous(),
            held_usable.to(torch.int8),
            torch.searchsorted(held, sorted_classes),
            torch.searchsorted(held, sorted_classes, right=True),
            rows,
            index,
            similarity,
            torch.full((1,), math.nan if weight is None else weight, dtype=torch.float64, device=units.device),
            count,
            choices,
            size,
            ROWS=config["rows"],
            OTHERS=config["others"],
            DEPTH=config["depth"],
            num_warps=config["num_warps"],
            num_stages=1,  # the row of a winner must not be fetched before it is known
        )
    return index, similarity
