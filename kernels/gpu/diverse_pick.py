"""Triton twin of `diverse_pick`: one program walks the anomalies of one class."""

# Pyright takes a launch, kernel[grid](...), for a call of the function itself, which knows no num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels import launch
from tadperf.kernels.diverse_pick import unit_rows


@triton.jit
def largest_cosines(mine, valid, units, others, present, largest, size, ROWS: tl.constexpr, OTHERS: tl.constexpr,
                    DEPTH: tl.constexpr):  # fmt: skip
    """The maximum of `largest` and the cosines of unit rows `mine` [ROWS] with rows `others` [OTHERS] of `units`."""
    cosines = tl.zeros((ROWS, OTHERS), tl.float32)
    for base in range(0, size, DEPTH):
        at = base + tl.arange(0, DEPTH)
        a = tl.load(mine[:, None] + at[None, :], mask=valid[:, None] & (at < size)[None, :], other=0)
        b = tl.load(units + others[None, :] * size + at[:, None], mask=present[None, :] & (at < size)[:, None], other=0)
        cosines = tl.dot(a, b, cosines, input_precision="ieee")
    return tl.maximum(largest, tl.max(tl.where(present[None, :], cosines, float("-inf")), 1))


@triton.jit
def walk(
    candidates,  # unit rows, float32 [A, K, size]
    scores,  # float64 [A, K]; -inf or NaN never wins
    pooled,  # int8 [A, K]
    order,  # int64 [A]: anomalies by class, in order within it
    classes,  # int64 [A], in that order
    qualified,  # unit rows, float32 [Q, size], those of a class adjacent
    usable,  # int8 [Q]
    firsts,  # int64 [A]: where the qualified of the class begin, and
    lasts,  # int64 [A]: end
    rows,  # int64 [A], in that order: the winner's row among the candidates, -1 where there is none
    index,
    similarity,
    weight,  # float64 [1]; NaN: diversity alone
    anomalies,
    choices,
    size,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """All anomalies of the class whose first one this program's place is; elsewhere nothing."""
    first = tl.program_id(0).to(tl.int64)
    label = tl.load(classes + first)
    if tl.load(classes + first - 1, mask=first > 0, other=label - 1) != label:
        begin, end, factor = tl.load(firsts + first), tl.load(lasts + first), tl.load(weight)
        place = first
        going = True
        while going:
            anomaly = tl.load(order + place)
            best = tl.full((), -1, tl.int64)
            top = tl.full((), float("-inf"), tl.float64)
            won = tl.full((), float("nan"), tl.float32)
            for chunk in range(0, choices, ROWS):
                row = anomaly * choices + chunk + tl.arange(0, ROWS)
                valid = chunk + tl.arange(0, ROWS) < choices
                valid = valid & (tl.load(pooled + row, mask=valid, other=0) != 0)
                mine = candidates + row * size
                largest = tl.full((ROWS,), float("-inf"), tl.float32)
                for base in range(begin, end, OTHERS):
                    other = base + tl.arange(0, OTHERS)
                    present = tl.load(usable + other, mask=other < end, other=0) != 0
                    largest = largest_cosines(
                        mine, valid, qualified, other, present, largest, size, ROWS, OTHERS, DEPTH
                    )
                for base in range(first, place, OTHERS):
                    at = base + tl.arange(0, OTHERS)
                    other = tl.load(rows + at, mask=at < place, other=-1)
                    largest = largest_cosines(
                        mine, valid, candidates, tl.maximum(other, 0), other >= 0, largest, size, ROWS, OTHERS, DEPTH
                    )
                score = tl.load(scores + row, mask=valid, other=float("-inf"))
                distance = 1 - largest.to(tl.float64)
                value = tl.where(factor != factor, distance, score + factor * distance)
                alone = tl.max(largest) == float("-inf")  # the class holds nothing yet
                value = tl.where(valid, tl.where(alone, score, value), float("-inf"))
                highest = tl.max(value)
                lowest = tl.min(tl.where(value == highest, row, row + ROWS))  # of equals
                better = highest > top
                best = tl.where(better, lowest, best)
                won = tl.where(better, tl.max(tl.where(row == lowest, largest, float("-inf"))), won)
                top = tl.where(better, highest, top)
            tl.store(index + anomaly, tl.where(best < 0, best, best - anomaly * choices))
            tl.store(similarity + anomaly, won)
            tl.store(rows + place, best)
            tl.debug_barrier()  # the next anomaly reads the row from other threads of this program
            place += 1
            going = tl.load(classes + place, mask=place < anomalies, other=label - 1) == label


def _pool(scores: Tensor, usable: Tensor, top_k: int | None) -> Tensor:
    """bool [A, K]: the top_k usable candidates by score; of equal scores those with the lower index."""
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
    """Index and similarity [A], for A, K and D of 1 or more."""
    count, choices, size = candidates.shape
    units, usable = unit_rows(candidates)
    scores = scores.double().contiguous()
    pooled = _pool(scores, usable, top_k)
    wanted, order = classes.long().sort(stable=True)
    held, held_order = qualified_classes.long().sort(stable=True)
    held_units, held_usable = unit_rows(qualified[held_order])
    index, rows = torch.empty_like(order), torch.empty_like(order)
    similarity = units.new_empty(count)
    options = launch.launch("diverse_pick", candidates.device, choices)
    walk[(count,)](
        units.contiguous(),
        scores,
        pooled.to(torch.int8),
        order,
        wanted,
        held_units.contiguous(),
        held_usable.to(torch.int8),
        torch.searchsorted(held, wanted),
        torch.searchsorted(held, wanted, right=True),
        rows,
        index,
        similarity,
        torch.full((1,), math.nan if weight is None else weight, dtype=torch.float64, device=units.device),
        count,
        choices,
        size,
        ROWS=options["rows"],
        OTHERS=options["others"],
        DEPTH=options["depth"],
        num_warps=options["num_warps"],
        num_stages=1,  # a winner's row must not be fetched before it is known
    )
    return index, similarity
