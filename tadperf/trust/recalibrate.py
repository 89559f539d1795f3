"""The inner recalibration: class anchors in feature space decide about the samples that the partition does not trust.

Anchors are the means of the trusted features, weighted by the posterior. They share one covariance, which is shrunk
(Ledoit and Wolf, 2004). A sample gets a candidate class if the nearest anchor by Mahalanobis distance and the nearest
by cosine agree, both with a large enough margin; the trusted samples set the smallest margin. The sample is recalled if
the candidate is its given label, and relabelled otherwise. TAD (arXiv 2502.05027) names the two measures; the margins
and the reliability are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.kernels import reliability as nearest_anchors

BLOCK = 2**22  # numbers processed at a time: 16 MB in float32; not tuned
PRECISION = 0.98  # share of trusted samples above a margin that must be nearest to their own anchor; not tuned


class Anchors(NamedTuple):
    """The K classes with samples int64 [K], their means [K, D], and the covariance's Cholesky factor [D, D]."""

    classes: Tensor
    means: Tensor
    cholesky: Tensor


class Recalibration(NamedTuple):
    """candidate int64 [N] (-1: none); strength [N] in [0, 1]; reliability [N] in [0, 1] of the given label."""

    candidate: Tensor
    strength: Tensor
    reliability: Tensor


def recalibrate(
    features: Tensor, labels: Tensor, trusted: Tensor, posterior: Tensor, num_classes: int
) -> Recalibration:
    """Returns candidate classes for all samples, and the reliability of trusted ones (TAD's inner loop).

    features: finite floats [N, D] of any precision; never copied as a whole. labels: int64 [N]. trusted: bool [N].
    posterior: float [N], the probability that the label is right.
    strength: the share of correct labels among trusted samples with margins at least as large. reliability: the
    posterior if both measures find the given class; otherwise it falls with the distance rank within the class, down
    to 0 for the most distant sample if neither measure finds its class.
    """
    anchors = fit_anchors(features, labels, trusted * posterior, num_classes)
    match = nearest_anchors(features, anchors.means, anchors.cholesky)
    nearest, most_similar = anchors.classes[match.nearest], anchors.classes[match.most_similar]
    if len(anchors.classes) == 1:
        distance_margin = similarity_margin = torch.ones_like(match.distance)
        second_distance = torch.full_like(match.distance, torch.inf)
    else:
        distance_margin = match.second_distance.square() - match.distance.square()
        similarity_margin = match.similarity - match.second_similarity
        second_distance = match.second_distance
    distance_strength, distance_floor = calibrate_margin(distance_margin, nearest == labels, trusted)
    similarity_strength, similarity_floor = calibrate_margin(similarity_margin, most_similar == labels, trusted)
    agree = (nearest == most_similar) & (distance_margin >= distance_floor) & (similarity_margin >= similarity_floor)
    votes = ((nearest == labels).float() + (most_similar == labels).float()) / 2
    second_distance = second_distance.where(anchors.classes[match.second.clamp(min=0)] == labels, torch.inf)
    rank = rank_within(torch.where(nearest == labels, match.distance, second_distance), labels)
    return Recalibration(
        candidate=torch.where(agree, nearest, -1),
        strength=torch.minimum(distance_strength, similarity_strength),
        reliability=torch.where(trusted, posterior * (1 - rank * (1 - votes)), 0.0),
    )


def fit_anchors(features: Tensor, labels: Tensor, weight: Tensor, num_classes: int) -> Anchors:
    """Returns weighted class means, and the shared, shrunk covariance around them.

    If no sample of a class has weight, each gets weight 1, so that samples of the class can be trusted again. A class
    without samples has no anchor.
    """
    total = torch.zeros(num_classes, dtype=weight.dtype, device=weight.device).index_add_(0, labels, weight)
    weight = torch.where(total[labels] > 0, weight, 1.0)
    total = torch.zeros_like(total).index_add_(0, labels, weight)
    classes = (total > 0).nonzero().squeeze(1)
    sums = torch.zeros(num_classes, features.shape[1], device=features.device)
    for rows in row_blocks(len(labels), features.shape[1]):
        sums.index_add_(0, labels[rows], features[rows].float() * weight[rows].unsqueeze(1))
    means = sums / total.clamp(min=1e-12).unsqueeze(1)
    used = (weight > 0).nonzero().squeeze(1)

    def residuals(rows: slice) -> Tensor:
        index = used[rows]
        return (features[index].float() - means[labels[index]]) * weight[index].sqrt().unsqueeze(1)

    factor = shrunk_cholesky(residuals, len(used), features.shape[1], features.device)
    return Anchors(classes, means[classes], factor)


def row_blocks(count: int, width: int) -> Iterator[slice]:
    """Returns slices of `count` rows of `width` numbers, at most BLOCK numbers each, so that copies stay small."""
    step = max(1, BLOCK // width)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def shrunk_cholesky(residuals: Callable[[slice], Tensor], count: int, size: int, device: torch.device) -> Tensor:
    """Returns the lower Cholesky factor [D, D] of the Ledoit-Wolf covariance around zero; D is `size`.

    residuals: returns rows of a matrix [N, D]; N is `count`. The shrinkage is that of
    sklearn.covariance.ledoit_wolf_shrinkage, computed in one pass. Products use float32, sums over blocks float64.
    """
    covariance = torch.zeros(size, size, dtype=torch.float64, device=device)
    fourth_moment = covariance.new_zeros(())
    for rows in row_blocks(count, size):
        z = residuals(rows)
        covariance += z.T @ z
        fourth_moment += z.square().sum(1).square().sum(dtype=torch.float64)
    covariance /= count
    sums = covariance.trace(), covariance.square().sum(), fourth_moment
    trace, squares, fourth = torch.stack(sums).cpu().tolist()  # one read: each read waits for the device
    mean = trace / size
    delta = squares - size * mean**2
    beta = (fourth / count - squares) / count
    shrinkage = min(max(beta, 0.0) / delta, 1.0) if delta > 0 else 1.0
    shrunk = (1 - shrinkage) * covariance
    shrunk.diagonal().add_(shrinkage * mean + 1e-6 * mean + 1e-12)  # keeps the factorisation stable; not tuned
    return torch.linalg.cholesky(shrunk).float()


def calibrate_margin(margin: Tensor, right: Tensor, trusted: Tensor) -> tuple[Tensor, float]:
    """Returns the strength [N] of each margin, and the lowest margin with PRECISION of the trusted samples right.

    The strength is the share of right samples among the trusted samples with at least that margin. Its running maximum
    makes it monotone: a larger margin never has less strength. Without trusted samples: strength 0, margin infinity.
    """
    index = trusted.nonzero().squeeze(1)
    values, correct = margin[index], right[index].double()
    if not len(values):
        return torch.zeros_like(margin), float("inf")
    order = values.argsort(descending=True, stable=True)
    share = correct[order].cumsum(0) / torch.arange(1, len(values) + 1, device=margin.device)
    share = share.flip(0).cummax(0).values.flip(0)
    enough = (share >= PRECISION).nonzero()
    floor = float(values[order[enough[-1]]]) if len(enough) else float("inf")
    ascending = values[order].flip(0).contiguous()
    position = torch.searchsorted(ascending, margin.contiguous()).clamp(max=len(values) - 1)
    return share.flip(0)[position].float(), floor


def rank_within(values: Tensor, groups: Tensor) -> Tensor:
    """Returns the rank of each value within its group, from 0 (lowest) to 1 (highest), float [N]."""
    order = values.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    size = groups.bincount()
    start = size.cumsum(0) - size
    sorted_groups = groups[order]
    place = torch.arange(len(order), device=values.device) - start[sorted_groups]
    rank = torch.empty_like(values)
    rank[order] = place.to(values) / (size[sorted_groups] - 1).clamp(min=1)
    return rank
