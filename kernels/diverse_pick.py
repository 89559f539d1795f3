"""One candidate for each anomalous image: of the best by score, the one least like what its class already holds.

Label-consistent distillation with detector-guided refinement (arXiv 2507.13074) takes, from a pool of the k candidates
of highest confidence, the one least similar to the qualified images of its class. With s(x) = max cos(x, u) over the
images u that the class holds, the winner has

    the smallest s                          where weight is None
    the largest score + weight * (1 - s)    otherwise (tadperf)

and joins its class at once. The anomalies of a class are visited in order; classes do not touch each other. Among
equals the lowest candidate wins. While a class holds nothing the best score wins, and its similarity is -inf.

A score of -inf or NaN, or a feature that is not finite, excludes a candidate; an anomaly without any candidate left
gets index -1 and similarity NaN. Qualified images with features that are not finite are passed over. An image whose
features are all 0 has cosine 0 with every other. Lengths are computed in float64, so that any finite features have one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.kernels import gpu, native

NARROW = (torch.float32, torch.bfloat16, torch.float16)  # what compiled code reads


class DiversePick(NamedTuple):
    """What `diverse_pick` gives for each anomaly: the winner's place among its candidates, and its s when it won."""

    index: Tensor
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
    """Greedy choice of the least similar candidate, class by class (arXiv 2507.13074; see this module's first lines).

    candidates: features, float [A, K, D], of A anomalous images with K candidates each. scores: float [A, K],
    confidence of the wanted class. qualified: features, float [Q, D]. classes [A], qualified_classes [Q]: int32 or
    int64, any values. top_k: size of the pool; None is all. weight: of diversity against score; None is diversity
    alone. Returns index int64 [A] and similarity [A], float32 (float64 for float64 candidates); no gradient. On a CPU
    compiled code gives the same bits for any number of threads. Raises ValueError for what does not fit.
    """
    _check(candidates, scores, qualified, classes, qualified_classes, top_k, weight)
    tensors = candidates.detach(), scores.detach(), qualified.detach(), classes, qualified_classes
    if torch.compiler.is_compiling():
        return DiversePick(*_operator(*tensors, top_k, None if weight is None else float(weight)))
    return _forward(*tensors, top_k, weight)


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
    """`diverse_pick` as a loop over the anomalies in plain PyTorch, on any device and float dtype."""
    _check(candidates, scores, qualified, classes, qualified_classes, top_k, weight)
    units, usable = unit_rows(candidates.detach())
    held_units, held_usable = unit_rows(qualified.detach().to(candidates.dtype))
    scores = scores.detach().double()
    usable &= scores > -math.inf
    index = classes.new_full(classes.shape, -1, dtype=torch.int64)
    similarity = units.new_full(classes.shape, math.nan)
    held: dict[int, Tensor] = {}
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
        best = (value == value.amax()).byte().argmax()  # the first: argmax documents no order among equals
        index[anomaly], similarity[anomaly] = pool[best], largest[best]
        held[label] = torch.cat([held[label], units[anomaly, pool[best]].unsqueeze(0)])
    return DiversePick(index, similarity)


def unit_rows(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features [..., D] scaled to length 1 in float32 (float64 from float64), and whether all of a row are finite."""
    length = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=torch.float64)
    units = features / torch.where(length > 0, length, 1)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return units.to(dtype), length.isfinite().squeeze(-1)


def _check(candidates, scores, qualified, classes, qualified_classes, top_k, weight) -> None:
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
    for name, x in (("scores", scores), ("qualified", qualified), ("classes", classes)):
        if x.device != candidates.device:
            raise ValueError(f"{name}: on {x.device}: expected {candidates.device}, where candidates are")
    if qualified_classes.device != candidates.device:
        raise ValueError(f"qualified_classes: on {qualified_classes.device}: expected {candidates.device}")
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
    out = DiversePick(torch.empty(count, dtype=torch.int64), torch.empty(count))
    module = native.module()
    assert module is not None
    module.diverse_pick(
        candidates if candidates.stride(-1) == 1 else candidates.contiguous(),
        scores.double().contiguous(),
        qualified if qualified.stride(-1) == 1 else qualified.contiguous(),
        classes.long().contiguous(),
        qualified_classes.long().contiguous(),
        max(choices, 1) if top_k is None else top_k,
        math.nan if weight is None else weight,
        *out,
        native.isa_index(),
        torch.get_num_threads(),
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
    narrow = candidates.dtype in NARROW and qualified.dtype in NARROW
    arguments = (candidates, scores, qualified, classes, qualified_classes)
    if narrow and candidates.device.type == "cpu" and native.available():
        return _native(*arguments, top_k, weight)
    if narrow and candidates.device.type == "cuda" and gpu.available() and candidates.numel():
        from tadperf.kernels.gpu import diverse_pick as twin

        return DiversePick(*twin.diverse_pick(*arguments, top_k, weight))
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
