"""Out-of-fold class probabilities from features: a ridge probe, the labels of neighbours, and a pool of several models.

No sample's own label is part of its probabilities, so they can be compared with that label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf import seeds
from tadperf.trust.neighbours import affinity, neighbour_labels

FOLDS = 5
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # of the ridge, as a share of the mean eigenvalue; not tuned
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)  # scores are multiplied by this before the softmax; not tuned
POOL_STEPS = 50
MIN_STD = 1e-6


def pool_features(features: Tensor, labels: Tensor, num_classes: int, model: Tensor | None = None) -> Tensor:
    """Returns out-of-fold probabilities [N, C] from features, and from a model's probabilities if they are given.

    features: finite floats [N, D]. labels: int64 [N], as given. model: [N, C] from a model that has not seen the
    labels. Sources are the ridge probe and the neighbours at every reach, by centred and by standardised features. The
    result is the mean of all sources, with the weights that predict the given labels best. The folds have a fixed seed.
    """
    centred = features - features.mean(0)
    z = centred / features.std(0, correction=0).clamp(min=MIN_STD)
    sources = [ridge_probabilities(z, labels, num_classes)]
    for values in (centred, z):
        sources += neighbour_probabilities(values, labels, num_classes)
    return pool(sources if model is None else [model, *sources], labels)


def pool(sources: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Returns the weighted mean of probabilities [N, C]; EM finds the weights of the highest likelihood (stacking)."""
    column = labels.unsqueeze(1)
    own = torch.cat([p.gather(1, column) for p in sources], 1).clamp(min=1e-6)
    weight = torch.full((len(sources),), 1 / len(sources))
    for _ in range(POOL_STEPS):
        share = own * weight
        weight = (share / share.sum(1, keepdim=True)).mean(0)
    mean = torch.zeros_like(sources[0])
    for p, w in zip(sources, weight.tolist(), strict=True):
        mean.add_(p, alpha=w)
    return mean / mean.sum(1, keepdim=True)


def ridge_probabilities(z: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Returns out-of-fold probabilities [N, C] of ridge regression on one-hot labels, solved in closed form.

    z: standardised floats [N, D]. The likelihood of the given labels chooses the penalty and the scale of the scores.
    """
    z, targets = z.double(), F.one_hot(labels, num_classes).double()
    fold = torch.randperm(len(z), generator=seeds.generator(0, "folds")) % min(FOLDS, len(z))
    scores = z.new_empty(len(PENALTIES), len(z), num_classes)
    for held_out in fold.unique():
        train, test = fold != held_out, fold == held_out
        mean, share = z[train].mean(0), targets[train].mean(0)
        x = z[train] - mean
        values, vectors = torch.linalg.eigh(x.T @ x)
        values = values.clamp(min=0)
        right = vectors.T @ (x.T @ (targets[train] - share))
        left = (z[test] - mean) @ vectors
        for number, penalty in enumerate(PENALTIES):
            shrunk = right / (values + penalty * values.mean().clamp(min=1e-12)).unsqueeze(1)
            scores[number, test] = left @ shrunk + share
    column = labels.unsqueeze(1)
    candidates = (
        (float((scale * s).log_softmax(1).gather(1, column).mean()), number, scale)
        for number, s in enumerate(scores)
        for scale in SCALES
    )
    _, number, scale = max(candidates)
    return (scale * scores[number]).softmax(1).float()


def neighbour_probabilities(z: Tensor, labels: Tensor, num_classes: int) -> Iterator[Tensor]:
    """Yields for each reach the label shares [N, C] that every sample sees in its neighbours of the other folds."""
    share = (labels.bincount(minlength=num_classes) / len(labels)).clamp(min=1 / len(labels))
    for _, votes in neighbour_labels(affinity(z.float()), labels, num_classes, 0):
        p = votes / votes.sum(1, keepdim=True).clamp(min=1e-12) + 0.01 * share  # for samples without neighbours
        yield p / p.sum(1, keepdim=True)
