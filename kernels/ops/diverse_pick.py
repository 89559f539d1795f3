"""Picks a candidate for each anomalous image: among the best scores, the one least similar to the images of its class.

Label-consistent distillation with detector-guided refinement (arXiv 2507.13074) collects the k candidates with the
highest confidence in a pool. From the pool it picks the candidate least similar to the qualified images of the class.
With s(x) = max cos(x, u) over all images u of the class, the winner has

    the smallest s                          if weight is None
    the largest score + weight * (1 - s)    otherwise (tadperf)

The winner joins its class at once. The anomalies of a class are handled in order; classes are independent. The lowest
index wins among equal candidates. If a class has no image yet, the best score wins, and its similarity is -inf.

A score of -inf or NaN, or a feature that is not finite, excludes a candidate. An anomaly without candidates gets index
-1 and similarity NaN. Qualified images with features that are not finite are ignored. An image with all features 0 has
cosine 0 with every other. Lengths are computed in float64, so any finite features have a finite length.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.kernels import gpu, native, registry
from tadperf.kernels.checks import check_dense, check_memory
from tadperf.kernels.dispatch import Route, record_call, route
from tadperf.kernels.native import ELEMENT_TYPES
from tadperf.kernels.shared import unit_rows

registry.register("diverse_pick")


class DiversePick(NamedTuple):
    """Results of `diverse_pick` for each anomaly: the index of its winner, and the similarity s of the winner."""

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    similarity: Tensor


def diverse_pick(
    candidates: Tensor,
    scores: Tensor,
    qualified: Tensor,
    classes: Tensor,
    qualified_classes: Tensor,
    *,
    top_k: int | None = None,
    weight: float | None = None,
) -> DiversePick:
    """Picks the least similar candidates greedily, class by class (arXiv 2507.13074; rules at the top of this file).

    candidates: features, float [A, K, D], of A anomalous images with K candidates each. scores: float [A, K],
    confidence of the target class. qualified: features, float [Q, D]. classes [A], qualified_classes [Q]: int32 or
    int64, any values. top_k: size of the pool; None takes all candidates. weight: weight of diversity against score;
    None ignores the score. Returns index int64 [A] and similarity [A], float32 (float64 for float64 candidates),
    without a gradient. On a CPU compiled code gives the same bits for any number of threads. Raises ValueError for
    wrong shapes, types, devices or settings.
    """
    _check(candidates, scores, qualified, classes, qualified_classes, top_k, weight)
    chosen = route("diverse_pick", candidates, scores, qualified, classes, qualified_classes)
    tensors = candidates.detach(), scores.detach(), qualified.detach(), classes, qualified_classes
    if chosen is Route.REFERENCE:
        return diverse_pick_reference(*tensors, top_k=top_k, weight=weight)
    run = _operator if chosen is Route.DISPATCHER else _forward
    return DiversePick(*run(*tensors, top_k, None if weight is None else float(weight)))


def diverse_pick_reference(
    candidates: Tensor,
    scores: Tensor,
    qualified: Tensor,
    classes: Tensor,
    qualified_classes: Tensor,
    *,
    top_k: int | None = None,
    weight: float | None = None,
) -> DiversePick:
    """Computes `diverse_pick` by a loop over the anomalies in plain PyTorch, on any device and float type."""
    _check(candidates, scores, qualified, classes, qualified_classes, top_k, weight)
    units, usable = unit_rows(candidates.detach())
    wide = torch.promote_types(candidates.dtype, qualified.dtype)  # rounds neither of them
    held_units, held_usable = unit_rows(qualified.detach().to(wide))
    held_units = held_units.to(units.dtype)
    scores = scores.detach().double()
    usable &= scores > -math.inf
    index = classes.new_full(classes.shape, -1, dtype=torch.int64)
    similarity = units.new_full(classes.shape, math.nan)
    held: dict[int, Tensor] = {}  # unit rows of the images of each class
    for anomaly, label in enumerate(classes.tolist()):
        if label not in held:
            held[label] = held_units[held_usable & (qualified_classes == label)]
        pool = usable[anomaly].nonzero()[:, 0]
        if top_k is not None:
            pool = pool[scores[anomaly, pool].sort(descending=True, stable=True).indices[:top_k].sort().values]
        if not len(pool):
            continue
        if len(held[label]):
            largest = (units[anomaly, pool] @ held[label].T).amax(-1)
            value = -largest.double() if weight is None else scores[anomaly, pool] + weight * (1 - largest.double())
        else:
            largest, value = units.new_full(pool.shape, -math.inf), scores[anomaly, pool]
        best = (value == value.amax()).byte().argmax()  # the first maximum; argmax alone may return any of them
        index[anomaly], similarity[anomaly] = pool[best], largest[best]
        held[label] = torch.cat([held[label], units[anomaly, pool[best]].unsqueeze(0)])
    return DiversePick(index, similarity)


def _check(
    candidates: Tensor,
    scores: Tensor,
    qualified: Tensor,
    classes: Tensor,
    qualified_classes: Tensor,
    top_k: int | None,
    weight: float | None,
) -> None:
    tensors = {"scores": scores, "qualified": qualified, "classes": classes, "qualified_classes": qualified_classes}
    check_dense(candidates=candidates, **tensors)
    if candidates.ndim != 3 or not candidates.is_floating_point():
        raise ValueError(f"candidates: {candidates.dtype} {tuple(candidates.shape)}: expected floats [A, K, D]")
    count, choices, size = candidates.shape
    if tuple(scores.shape) != (count, choices) or not scores.is_floating_point():
        raise ValueError(f"scores: {scores.dtype} {tuple(scores.shape)}: expected floats {(count, choices)}")
    if qualified.ndim != 2 or qualified.shape[1] != size or not qualified.is_floating_point():
        raise ValueError(f"qualified: {qualified.dtype} {tuple(qualified.shape)}: expected floats [Q, {size}]")
    for name, x, length in (("classes", classes, count), ("qualified_classes", qualified_classes, len(qualified))):
        if tuple(x.shape) != (length,) or x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: {x.dtype} {tuple(x.shape)}: expected int32 or int64 {(length,)}")
    for name, x in tensors.items():
        if x.device != candidates.device:
            raise ValueError(f"{name}: on {x.device}: expected {candidates.device}, like the candidates")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: {top_k}: expected 1 or more, or None")
    if weight is not None and not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"weight: {weight}: expected a finite number of 0 or more, or None")


def _native(
    candidates: Tensor,
    scores: Tensor,
    qualified: Tensor,
    classes: Tensor,
    qualified_classes: Tensor,
    top_k: int | None,
    weight: float | None,
) -> DiversePick:
    count, choices, _ = candidates.shape
    out = DiversePick(*(candidates.new_empty(count, dtype=dtype) for dtype in (torch.int64, torch.float32)))
    native.call(
        "diverse_pick",
        candidates if candidates.stride(-1) == 1 else candidates.contiguous(),
        scores.double().contiguous(),
        qualified if qualified.stride(-1) == 1 else qualified.contiguous(),
        classes.long().contiguous(),
        qualified_classes.long().contiguous(),
        *out,
        max(choices, 1) if top_k is None else top_k,
        math.nan if weight is None else weight,
    )
    return out


def _forward(
    candidates: Tensor,
    scores: Tensor,
    qualified: Tensor,
    classes: Tensor,
    qualified_classes: Tensor,
    top_k: int | None,
    weight: float | None,
) -> DiversePick:
    check_memory(candidates=candidates, scores=scores, qualified=qualified)
    check_memory(classes=classes, qualified_classes=qualified_classes)
    supported = candidates.dtype in ELEMENT_TYPES and qualified.dtype in ELEMENT_TYPES
    arguments = (candidates, scores, qualified, classes, qualified_classes)
    if supported and candidates.device.type == "cpu" and native.available():
        record_call("diverse_pick", "cpu")
        return _native(*arguments, top_k, weight)
    if supported and candidates.device.type == "cuda" and gpu.available() and candidates.numel():
        from tadperf.kernels.gpu import diverse_pick as triton

        record_call("diverse_pick", "cuda")
        return DiversePick(*triton.diverse_pick(*arguments, top_k, weight))
    record_call("diverse_pick", None)
    return diverse_pick_reference(*arguments, top_k=top_k, weight=weight)


@torch.library.custom_op("tadperf::diverse_pick", mutates_args=())
def _operator(
    candidates: Tensor,
    scores: Tensor,
    qualified: Tensor,
    classes: Tensor,
    qualified_classes: Tensor,
    top_k: int | None,
    weight: float | None,
) -> tuple[Tensor, Tensor]:
    _check(candidates, scores, qualified, classes, qualified_classes, top_k, weight)
    return _forward(candidates, scores, qualified, classes, qualified_classes, top_k, weight)[:]  # a plain tuple


@_operator.register_fake
def _(
    candidates: Tensor,
    scores: Tensor,
    qualified: Tensor,
    classes: Tensor,
    qualified_classes: Tensor,
    top_k: int | None,
    weight: float | None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if candidates.dtype == torch.float64 else torch.float32
    return classes.new_empty(classes.shape, dtype=torch.int64), candidates.new_empty(classes.shape, dtype=dtype)
