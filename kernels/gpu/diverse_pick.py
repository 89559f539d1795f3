"""`diverse_pick` in Triton: matrix products give the cosines, and a short scan picks the winners of a class in order.

The anomalies of a class are handled in panels. The order of the picks matters within a panel only:

    join_kernel   raises the largest cosine of each candidate by its cosines with the qualified images of its class
    gram_kernel   writes the cosines of the candidates of a panel with each other
    scan_kernel   picks the winners of the panel, one program for each class; a pick reads the cosines of K candidates
                  with the earlier winners of the panel
    join_kernel   raises the largest cosines of the candidates of later panels by their cosines with these winners

All classes run at the same time. No sum depends on the grid, so every run gives the same bits. The candidates of one
anomaly meet an image in the same kernel, so equal candidates have equal cosines.
"""

# Pyright reads a launch, kernel[grid](...), as a call of the function itself, which has no num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.gpu import MATMUL_PRECISION, on_device
from tadperf.kernels.gpu.launch_configs import launch_config
from tadperf.kernels.shared import unit_rows

GRAM = 2**26  # cosines of candidates with each other in memory at a time, 256 MB; not tuned


@triton.jit
def cosine_tile(
    units_ptr,
    row,
    row_mask,
    others_ptr,
    other,
    other_mask,
    n_features,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Returns the dot products [ROWS, OTHERS] of the rows `row` of units with the rows `other` of others."""
    cosines = tl.zeros((ROWS, OTHERS), tl.float32)
    for start in range(0, n_features, DEPTH):
        feature = start + tl.arange(0, DEPTH)
        inside = feature < n_features
        a_ptrs = units_ptr + row[:, None] * n_features + feature[None, :]
        b_ptrs = others_ptr + other[None, :] * n_features + feature[:, None]
        a = tl.load(a_ptrs, mask=row_mask[:, None] & inside[None, :], other=0)
        b = tl.load(b_ptrs, mask=other_mask[None, :] & inside[:, None], other=0)
        cosines = tl.dot(a, b, cosines, input_precision=PRECISION)
    return cosines


@triton.jit
def join_kernel(
    units_ptr,  # unit rows of the candidates, float32 [A, K, D]
    order_ptr,  # int64 [A]: anomalies sorted by class, and by index within a class
    begins_ptr,  # int64 [classes]: where the anomalies of a class begin in this order
    ends_ptr,
    others_ptr,  # unit rows, float32 [Q or A K, D]
    table_ptr,  # int64: rows of others, sorted by class; -1 is no row
    other_begins_ptr,  # int64 [classes]: where the part of a class begins in the table
    other_ends_ptr,
    largest_ptr,  # float32 [A, K]: the largest cosine of each candidate
    first_place,  # the first anomaly of a class that is updated
    first_other,  # the first entry of the part of a class that is read
    n_others,  # the number of entries that are read
    n_candidates,
    n_features,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Raises `largest` of ROWS candidates of one class by their cosines with entries of the table."""
    label = tl.program_id(1)
    begin = tl.load(begins_ptr + label) + first_place
    candidate = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = begin + candidate // n_candidates
    row_mask = place < tl.load(ends_ptr + label)
    row = tl.load(order_ptr + place, row_mask, other=0) * n_candidates + candidate % n_candidates
    other_begin = tl.load(other_begins_ptr + label) + first_other
    other_end = tl.minimum(other_begin + n_others, tl.load(other_ends_ptr + label))
    if begin + tl.program_id(0) * ROWS // n_candidates < tl.load(ends_ptr + label):
        largest = tl.full((ROWS,), -float("inf"), tl.float32)
        for base in range(other_begin, other_end, OTHERS):
            entry = base + tl.arange(0, OTHERS)
            other = tl.load(table_ptr + entry, entry < other_end, other=-1)
            cosines = cosine_tile(
                units_ptr, row, row_mask, others_ptr, other, other >= 0, n_features, ROWS, OTHERS, DEPTH, PRECISION
            )
            largest = tl.maximum(largest, tl.max(tl.where((other >= 0)[None, :], cosines, -float("inf")), 1))
        largest = tl.maximum(largest, tl.load(largest_ptr + row, row_mask, other=0))
        tl.store(largest_ptr + row, largest, row_mask)


@triton.jit
def gram_kernel(
    units_ptr, order_ptr, begins_ptr, ends_ptr, gram_ptr, first_place, n_places, n_candidates, n_features,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes a tile of gram [classes, P K, P K]: the cosines of the candidates of a panel with those after them."""
    label = tl.program_id(2).to(tl.int64)
    begin = tl.load(begins_ptr + label) + first_place
    size = n_places * n_candidates
    filled = tl.minimum(tl.load(ends_ptr + label) - begin, n_places) * n_candidates
    first, last = tl.program_id(0) * ROWS, tl.program_id(1) * OTHERS + OTHERS - 1
    if (first < last) & (first < filled) & (tl.program_id(1) * OTHERS < filled):
        a, b = first + tl.arange(0, ROWS), tl.program_id(1) * OTHERS + tl.arange(0, OTHERS)
        row = tl.load(order_ptr + begin + a // n_candidates, a < filled, other=0) * n_candidates + a % n_candidates
        other = tl.load(order_ptr + begin + b // n_candidates, b < filled, other=0) * n_candidates + b % n_candidates
        cosines = cosine_tile(
            units_ptr, row, a < filled, units_ptr, other, b < filled, n_features, ROWS, OTHERS, DEPTH, PRECISION
        )
        to = gram_ptr + label * size * size + a[:, None].to(tl.int64) * size + b[None, :]
        tl.store(to, cosines, (a < size)[:, None] & (b < size)[None, :])  # the rest is 0 and is not read


@triton.jit
def best_candidate(
    anomaly,
    place,
    winners,
    gram_ptr,
    largest_ptr,
    scores_ptr,
    pooled_ptr,
    weight,
    size,
    n_candidates,
    CANDIDATES: tl.constexpr,
):
    """Returns the index and the similarity of the winner of one anomaly; the index is -1 if there is no winner.

    place: of the anomaly in its panel. winners [PLACES]: rows of the earlier winners in gram [P K, P K], or -1.
    """
    best = tl.full((), -1, tl.int32)
    best_value = tl.full((), float("-inf"), tl.float64)
    similarity = tl.full((), float("nan"), tl.float32)
    for start in range(0, n_candidates, CANDIDATES):
        candidate = start + tl.arange(0, CANDIDATES)
        inside = candidate < n_candidates
        at = anomaly * n_candidates + candidate
        gram_ptrs = gram_ptr + winners[:, None].to(tl.int64) * size + (place * n_candidates + candidate)[None, :]
        cosines = tl.load(gram_ptrs, (winners >= 0)[:, None] & inside[None, :], other=float("-inf"))
        largest = tl.maximum(tl.load(largest_ptr + at, inside, other=float("-inf")), tl.max(cosines, 0))
        valid = inside & (tl.load(pooled_ptr + at, mask=inside, other=0) != 0)
        largest = tl.where(valid, largest, float("-inf"))
        score = tl.load(scores_ptr + at, mask=valid, other=float("-inf"))
        distance = 1 - largest.to(tl.float64)
        value = tl.where(weight != weight, distance, score + weight * distance)
        empty_class = tl.max(largest) == float("-inf")
        value = tl.where(valid, tl.where(empty_class, score, value), float("-inf"))
        highest = tl.max(value)
        lowest = tl.min(tl.where(value == highest, candidate, n_candidates))  # among equal values
        better = highest > best_value
        best = tl.where(better, lowest, best)
        similarity = tl.where(better, tl.max(tl.where(candidate == lowest, largest, float("-inf"))), similarity)
        best_value = tl.where(better, highest, best_value)
    return best, similarity


@triton.jit
def scan_kernel(
    gram_ptr,  # float32 [classes, P K, P K]
    largest_ptr,  # float32 [A, K], without the winners of this panel
    scores_ptr,  # float64 [A, K]; -inf and NaN never win
    pooled_ptr,  # int8 [A, K]: whether a candidate is in the pool
    order_ptr,
    begins_ptr,
    ends_ptr,
    rows_ptr,  # int64 [A], in sorted order: row of the winner, -1 if there is none
    index_ptr,
    similarity_ptr,
    weight_ptr,  # float64 [1]; NaN ignores the score
    first_place,
    n_places,
    n_candidates,
    PLACES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Picks the winners of one panel of one class, one anomaly after another."""
    label = tl.program_id(0).to(tl.int64)
    begin = tl.load(begins_ptr + label) + first_place
    size = n_places * n_candidates
    gram_ptr += label * size * size
    weight = tl.load(weight_ptr)
    winners = tl.full((PLACES,), -1, tl.int32)
    for place in range(0, tl.minimum(tl.load(ends_ptr + label) - begin, n_places).to(tl.int32)):
        anomaly = tl.load(order_ptr + begin + place)
        best, similarity = best_candidate(  # pyright: ignore[reportGeneralTypeIssues]
            anomaly,
            place,
            winners,
            gram_ptr,
            largest_ptr,
            scores_ptr,
            pooled_ptr,
            weight,
            size,
            n_candidates,
            CANDIDATES,
        )
        tl.store(index_ptr + anomaly, best.to(tl.int64))
        tl.store(similarity_ptr + anomaly, similarity)
        tl.store(rows_ptr + begin + place, tl.where(best < 0, -1, anomaly * n_candidates + best))
        row = tl.where(best < 0, -1, place * n_candidates + best)
        winners = tl.where(tl.arange(0, PLACES) == place, row, winners)


def _pool(scores: Tensor, usable: Tensor, top_k: int | None) -> Tensor:
    """Returns bool [A, K]: the top_k usable candidates by score. Among equal scores the lower index comes first."""
    usable = usable & (scores > -math.inf)
    if top_k is None or top_k >= scores.shape[1]:
        return usable
    ranked = torch.where(usable, scores, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(usable).scatter_(-1, ranked[:, :top_k], True) & usable


def panel_size(largest_class: int, classes: int, choices: int, limit: int) -> int:
    """Returns the number of anomalies of each class in a panel: at most `limit`, and its cosines fit into GRAM."""
    return max(1, min(largest_class, limit, math.isqrt(GRAM // classes) // choices))


def diverse_pick(
    candidates: Tensor,
    scores: Tensor,
    qualified: Tensor,
    classes: Tensor,
    qualified_classes: Tensor,
    top_k: int | None,
    weight: float | None,
) -> tuple[Tensor, Tensor]:
    """Returns index and similarity [A]. A, K and D must be 1 or more. Waits for the device to read the class sizes."""
    count, choices, _ = candidates.shape
    units, usable = unit_rows(candidates)
    units, device = units.contiguous(), candidates.device
    scores = scores.double().contiguous()
    pooled = _pool(scores, usable, top_k).to(torch.int8)
    sorted_classes, order = classes.long().sort(stable=True)
    labels, sizes = sorted_classes.unique_consecutive(return_counts=True)
    ends = sizes.cumsum(0)
    spans = order, ends - sizes, ends
    held, held_order = qualified_classes.long().sort(stable=True)
    held_units, held_usable = unit_rows(qualified[held_order])
    held_rows = torch.where(held_usable, torch.arange(len(held), device=device), -1)
    held_spans = torch.searchsorted(held, labels), torch.searchsorted(held, labels, right=True)
    rows, index = torch.empty_like(order), torch.empty_like(order)
    similarity, largest = units.new_empty(count), units.new_full((count, choices), -math.inf)
    share = torch.full((1,), math.nan if weight is None else weight, dtype=torch.float64, device=device)
    results = rows, index, similarity
    with on_device(candidates):
        _launch(
            units,
            spans,
            (held_units.contiguous(), held_rows, held_spans),
            (largest, scores, pooled),
            results,
            share,
            int(sizes.max()),
        )
    return index, similarity


def _launch(
    units: Tensor,
    spans: tuple[Tensor, ...],
    held: tuple[Tensor, Tensor, tuple[Tensor, ...]],
    per_candidate: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    share: Tensor,
    most: int,
) -> None:
    """Fills the results panel by panel. most: the number of anomalies of the largest class."""
    _, choices, width = units.shape
    largest, classes = per_candidate[0], len(spans[1])
    config: dict[str, Any] = dict(launch_config("diverse_pick", units.device, choices))
    places, scan = panel_size(most, classes, choices, config.pop("places")), config.pop("candidates")
    gram = units.new_empty(classes * (places * choices) ** 2 if places > 1 else 0)
    tile = {key.upper(): config.pop(key) for key in ("rows", "others", "depth")}
    config |= tile | {"PRECISION": MATMUL_PRECISION}

    def join(begin: int, others: Tensor, table: Tensor, other_spans: tuple[Tensor, ...], *part: int) -> None:
        grid = triton.cdiv((most - begin) * choices, config["ROWS"]), classes
        join_kernel[grid](units, *spans, others, table, *other_spans, largest, begin, *part, choices, width, **config)

    tiles = triton.cdiv(places * choices, config["ROWS"]), triton.cdiv(places * choices, config["OTHERS"])
    join(0, *held, 0, len(held[1]))
    for begin in range(0, most, places):
        if places > 1:
            gram_kernel[(*tiles, classes)](units, *spans, gram, begin, places, choices, width, **config)
        scan_kernel[(classes,)](
            gram,
            *per_candidate,
            *spans,
            *results,
            share,
            begin,
            places,
            choices,
            PLACES=triton.next_power_of_2(places),
            CANDIDATES=min(scan, triton.next_power_of_2(choices)),
            num_warps=config["num_warps"],
        )
        if begin + places < most:
            join(begin + places, units, results[0], spans[1:], begin, places)
