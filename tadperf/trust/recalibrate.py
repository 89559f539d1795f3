"""The inner recalibration: class anchors in feature space check the classes that the pooled sources find.

Anchors are the means of the trusted features, weighted by the posterior. They share one covariance, which is shrunk
(Ledoit and Wolf, 2004). Two measures vote for the class of a sample: its nearest anchor by Mahalanobis distance, and
the nearest by cosine. TAD (arXiv 2502.05027) names the two measures; the rest is ours:

The probability of a class is multiplied by the strength of its votes (0, 1 or 2), which is estimated from the given
labels. Among confident samples, take those whose class has v votes. Their share of given labels that equal the class,
above chance, is s_v. Where the class is wrong, the label equals it by chance only. So s_v / s_2 estimates how often the
class is right with v votes, relative to two votes. On 25 000 CIFAR-10 images (CIFAR-10N, worse) the estimates are 0.85
and 0.92 for no and one vote, the true shares 0.84 and 0.92; on digits with symmetric:0.8 they are 0 and 0.43 (0.17 and
0.39): there the anchors know more than the other sources.

A sample is relabelled only if both measures name its class, each with a margin to the second class that is calibrated
on the anchors' samples (PRECISION). Without this rule, digits with asymmetric:0.4 end with 99.3 % right labels in the
view at 99.9 % coverage, with it 99.9 % at 97.3 % (2 seeds); a PRECISION of 0.98 gives 99.9 % at 96.8 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.kernels import reliability as nearest_anchors

BLOCK = 2**22  # numbers processed at a time: 16 MB in float32; not tuned
PRECISION = 0.95  # share of anchors' samples above a margin that are nearest to their own anchor
PRIOR_SAMPLES = (
    10.0  # in the estimate of a strength; they have the strengths 0, 0.5 and 1 for 0, 1 and 2 votes; not tuned
)


class Anchors(NamedTuple):
    """The K classes with samples int64 [K], their means [K, D], and the covariance's Cholesky factor [D, D]."""

    classes: Tensor
    means: Tensor
    cholesky: Tensor


class Recalibration(NamedTuple):
    """strength [N] in [0, 1] of the votes for the classes; clear bool [N]: both measures name the class, by far."""

    strength: Tensor
    clear: Tensor


def recalibrate(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    classes: Tensor,
    blind: Tensor,
    confident: Tensor,
    num_classes: int,
) -> Recalibration:
    """Checks the class of each sample by the anchors (TAD's inner loop; see the top of this module).

    features: finite floats [N, D] of any precision; never copied as a whole. labels: int64 [N], as given. weight: float
    [N] of the samples that make the anchors, and that calibrate the margins. classes: int64 [N], the class to check.
    blind: int64 [N], the class that sources find which have not seen the sample's label. confident: bool [N], the
    samples to estimate the strengths on.
    """
    anchors = fit_anchors(features, labels, weight, num_classes)
    match = nearest_anchors(features, anchors.means, anchors.cholesky)
    nearest, most_similar = anchors.classes[match.nearest], anchors.classes[match.most_similar]
    strength = vote_strength(
        (nearest == blind).long() + (most_similar == blind), labels == blind, confident, num_classes
    )
    votes = (nearest == classes).long() + (most_similar == classes)
    if len(anchors.classes) == 1:
        return Recalibration(strength[votes], votes == 2)
    distance_margin = match.second_distance.square() - match.distance.square()
    similarity_margin = match.similarity - match.second_similarity
    used = weight > 0
    far = distance_margin >= lowest_margin(distance_margin, nearest == labels, used)
    far &= similarity_margin >= lowest_margin(similarity_margin, most_similar == labels, used)
    return Recalibration(strength[votes], (votes == 2) & far)


def vote_strength(votes: Tensor, equal: Tensor, confident: Tensor, num_classes: int) -> Tensor:
    """Returns the strength [3] of 0, 1 and 2 votes (see the top of this module). It grows with the votes.

    votes: int64 [N]. equal: bool [N], whether the given label is the class. confident: bool [N].
    """
    counted = confident.float()
    total = torch.zeros(3, device=votes.device).index_add_(0, votes, counted)
    hits = torch.zeros(3, device=votes.device).index_add_(0, votes, counted * equal)
    excess = hits - total / num_classes
    best = excess[2] / total[2].clamp(min=1.0)
    prior = torch.linspace(0, 1, 3, device=votes.device)
    strength = (excess + PRIOR_SAMPLES * best * prior) / ((total + PRIOR_SAMPLES) * best).clamp(min=1e-6)
    strength = torch.where(best > 0, strength, prior).clamp(0, 1)
    strength[2:].fill_(1.0)  # an assignment would copy the number to the device, and wait
    return strength.cummax(0).values


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


def lowest_margin(margin: Tensor, right: Tensor, used: Tensor) -> Tensor:
    """Returns the lowest margin above which PRECISION of the used samples are right, a scalar; infinity if none is.

    margin: float [N]. right, used: bool [N].
    """
    order = margin.argsort(descending=True, stable=True)
    counted = used[order]
    share = (right[order] & counted).double().cumsum(0) / counted.cumsum(0).clamp(min=1)
    return torch.where(counted & (share >= PRECISION), margin[order], torch.inf).amin()
