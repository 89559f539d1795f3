"""Result types, constants and input preparation that operators share with their Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Constants of `mixture`. Compiled code and Triton take them from here.
SLACK = 1e-6  # a step may lower the mean log-density by this much; the floor of the variances alone lowered it by 2e-7
TINY = 10 * torch.finfo(torch.float64).eps  # added to the weight of a component, as in sklearn; avoids a division by 0
MAX_CUTS = 20  # cuts by two-means; not tuned
SMALLEST_PART = 50  # a part keeps at least one in 50 samples: 2 %


class PerSample(NamedTuple):
    """Results of `per_sample`, each in the batch shape of the logits. `prediction` is int64, the others are floats."""

    loss: Tensor
    confidence: Tensor
    prediction: Tensor
    margin: Tensor
    entropy: Tensor


def empty_results(labels: Tensor) -> PerSample:
    """Returns uninitialised float32 results for labels [N], on the device of the labels.

    A size as an integer takes 1 us less than a torch.Size, and `empty_like` 0.2 us less again.
    """
    count = labels.shape[0]
    loss = labels.new_empty(count, dtype=torch.float32)
    confidence, margin, entropy = torch.empty_like(loss), torch.empty_like(loss), torch.empty_like(loss)
    return PerSample(loss, confidence, labels.new_empty(count, dtype=torch.int64), margin, entropy)


class Reliability(NamedTuple):
    """Results of `reliability`, each in the batch shape of the features. Classes are int64, values are floats."""

    nearest: Tensor
    distance: Tensor
    second: Tensor
    second_distance: Tensor
    most_similar: Tensor
    similarity: Tensor
    second_similar: Tensor
    second_similarity: Tensor


def centre_and_directions(anchors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the mean anchor [D] and the anchors scaled to length 1 [C, D].

    Anchors of length 0 stay zero. Anchors that are not finite become NaN and do not count in the mean.
    """
    exact = anchors.double()
    usable = exact.isfinite().all(-1, keepdim=True)
    exact = torch.where(usable, exact, 0)
    centre = exact.sum(0) / usable.sum().clamp(min=1)
    scale = exact.abs().amax(-1, keepdim=True)  # squares of the largest doubles would overflow
    exact = exact / torch.where(scale > 0, scale, 1)
    length = exact.norm(dim=-1, keepdim=True)
    directions = torch.where(usable, exact / torch.where(length > 0, length, 1), float("nan"))
    return centre.to(dtype), directions.to(dtype).contiguous()


def unit_rows(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns features [..., D] scaled to length 1, and whether all features of a row are finite [...].

    The scaled features are float32 (float64 for float64 features).
    """
    length = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=torch.float64)
    units = features / torch.where(length > 0, length, 1)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return units.to(dtype), length.isfinite().squeeze(-1)
