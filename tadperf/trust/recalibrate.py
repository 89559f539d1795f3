"""The inner loop: class anchors in feature space speak for samples whose given label the losses did not trust.

Anchors are the reliability-weighted means of the trusted features, their covariance is tied over the classes and shrunk
(Ledoit and Wolf, 2004). A sample gets a candidate class where the nearest anchor by Mahalanobis distance and by cosine
agree, both with a margin that the trusted samples show to be enough: recalled if that is its given label, relabelled
if not. (TAD, arXiv 2502.05027, names the two measures; the margins and the reliability are ours.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.kernels import reliability as nearest_anchors

BLOCK = 2**22  # numbers at a time; 16 MB in float32
PRECISION = 0.98  # share of trusted samples above a margin whose nearest anchor must be that of their label


class Anchors(NamedTuple):
    """means [K, D] of the classes int64 [K] that have any weight, and the Cholesky factor [D, D] of the covariance."""

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
    """Candidates for all samples, and the reliability of trusted ones (TAD's inner loop; this module's first lines).

    features: float [N, D] of any type, finite; never copied as a whole. labels: int64 [N]. trusted: bool [N].
    posterior: float [N], that the label is right.
    strength is the share of trusted samples with at least so small margins that agree with their label. Reliability is
    the posterior where both measures find the given class, and falls with the distance rank in the class where not.
    """
    anchors = fit_anchors(features, labels, trusted * posterior, num_classes)
    found = nearest_anchors(features, anchors.means, anchors.cholesky)
    near, similar = anchors.classes[found.nearest], anchors.classes[found.most_similar]
    one = len(anchors.classes) == 1
    far = torch.ones_like(found.distance) if one else found.second_distance.square() - found.distance.square()
    unlike = torch.ones_like(far) if one else found.similarity - found.second_similarity
    sure_far, floor_far = calibrate(far, near == labels, trusted)
    sure_unlike, floor_unlike = calibrate(unlike, similar == labels, trusted)
    agree = (near == similar) & (far >= floor_far) & (unlike >= floor_unlike)
    candidate = torch.where(agree, near, -1)
    votes = ((near == labels).float() + (similar == labels).float()) / 2
    runner_up = torch.full_like(far, torch.inf) if one else found.second_distance
    runner_up = runner_up.where(anchors.classes[found.second.clamp(min=0)] == labels, torch.inf)
    rank = rank_within(torch.where(near == labels, found.distance, runner_up), labels)
    graded = posterior * (1 - rank * (1 - votes))
    return Recalibration(candidate, torch.minimum(sure_far, sure_unlike), torch.where(trusted, graded, 0.0))


def fit_anchors(features: Tensor, labels: Tensor, weight: Tensor, num_classes: int) -> Anchors:
    """Weighted class means and the tied, shrunk covariance about them.

    Where nothing of a class has weight all its samples count, so that it can come back; an empty class has no anchor.
    """
    total = torch.zeros(num_classes, dtype=weight.dtype).index_add_(0, labels, weight)
    weight = torch.where(total[labels] > 0, weight, 1.0)
    total = torch.zeros_like(total).index_add_(0, labels, weight)
    classes = (total > 0).nonzero().squeeze(1)
    sums = torch.zeros(num_classes, features.shape[1])
    for rows in blocks(len(labels), features.shape[1]):
        sums.index_add_(0, labels[rows], features[rows].float() * weight[rows].unsqueeze(1))
    means = sums / total.clamp(min=1e-12).unsqueeze(1)
    used = (weight > 0).nonzero().squeeze(1)

    def residuals(rows: slice) -> Tensor:
        own = used[rows]
        return (features[own].float() - means[labels[own]]) * weight[own].sqrt().unsqueeze(1)

    return Anchors(classes, means[classes], cholesky_shrunk(residuals, len(used), features.shape[1]))


def blocks(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` rows of this width, BLOCK numbers each: nothing as large as the features is made of them."""
    step = max(1, BLOCK // width)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def cholesky_shrunk(residuals: Callable[[slice], Tensor], count: int, size: int) -> Tensor:
    """Lower Cholesky factor [D, D] of the Ledoit-Wolf covariance about zero of residuals [N, D], asked for by rows.

    The coefficient is that of sklearn.covariance.ledoit_wolf_shrinkage, in one pass. Products are in float32, sums over
    the blocks in float64.
    """
    covariance, fourth = torch.zeros(size, size, dtype=torch.float64), 0.0
    for rows in blocks(count, size):
        z = residuals(rows)
        covariance += z.T @ z
        fourth += float(z.square().sum(1).square().sum(dtype=torch.float64))
    covariance /= count
    mean = float(covariance.trace()) / size
    delta = float(covariance.square().sum()) - size * mean**2
    beta = (fourth / count - float(covariance.square().sum())) / count
    shrinkage = min(max(beta, 0.0) / delta, 1.0) if delta > 0 else 1.0
    shrunk = (1 - shrinkage) * covariance
    shrunk.diagonal().add_(shrinkage * mean + 1e-6 * mean + 1e-12)
    return torch.linalg.cholesky(shrunk).float()


def calibrate(margin: Tensor, right: Tensor, trusted: Tensor) -> tuple[Tensor, float]:
    """Strength [N] of each margin, and the lowest margin from which on PRECISION of the trusted samples are right.

    The strength of a margin is the share of right ones among the trusted samples with at least that margin, made
    monotone by its running maximum from small margins on.
    """
    own, ok = margin[trusted], right[trusted].double()
    if not len(own):
        return torch.zeros_like(margin), float("inf")
    order = own.argsort(descending=True, stable=True)
    share = ok[order].cumsum(0) / torch.arange(1, len(own) + 1)
    share = share.flip(0).cummax(0).values.flip(0)  # descending margins: a larger one is never worth less
    enough = (share >= PRECISION).nonzero()
    floor = float(own[order[enough[-1]]]) if len(enough) else float("inf")
    ascending = own[order].flip(0).contiguous()
    place = torch.searchsorted(ascending, margin.contiguous()).clamp(max=len(own) - 1)
    return share.flip(0)[place].float(), floor


def rank_within(values: Tensor, groups: Tensor) -> Tensor:
    """Rank of each value within its group, from 0 (lowest) to 1, float [N]."""
    order = values.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    size = groups.bincount()
    start = size.cumsum(0) - size
    rank = torch.empty_like(values)
    own = groups[order]
    rank[order] = (torch.arange(len(order)) - start[own]).to(values) / (size[own] - 1).clamp(min=1)
    return rank
