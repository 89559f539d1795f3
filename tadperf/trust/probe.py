"""Out-of-fold class probabilities from features: a ridge probe, the labels of neighbours, and a pool of several models.

No sample's own label is part of its probabilities, so they can be compared with that label. Features are read in
blocks, so they may be memory-mapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.progress import Progress, silent
from tadperf.trust.neighbours import affinity, neighbour_labels

FOLDS = 5
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # of the ridge, as a share of the mean eigenvalue; not tuned
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # scores are multiplied by this before the softmax; not tuned
SELECTION_SIZE = 2**14  # samples that choose penalty and scale; not tuned
MAX_FEATURES = 4096  # wider features are projected to this width, because the ridge needs D x D numbers; not tuned
BLOCK = 2**22  # numbers in a block: 16 MB in float32; not tuned
# Neighbours among wider features are those among their principal components. On 10 000 CIFAR-10 images with 2048
# features of random filters, the vote of 10 neighbours is right for 44.6 % with 256 components and for 44.5 % with all
# features; 94 % of the neighbours are the same. A random projection to 512 has 43.5 %.
WIDE, COMPONENTS = 512, 256
POOL_STEPS = 50
POOL_GAIN = 0.01  # nats a label that a pool must gain over its best source; chosen on 36 cases
MIN_STD = 1e-6  # as a share of the mean: a feature that varies less is constant


class Standardised:
    """Features [N, D] of any float type, centred and divided by their standard deviation when rows are read.

    Constant features become 0. If D exceeds MAX_FEATURES, a random projection with a fixed seed comes first.
    """

    def __init__(self, features: Tensor) -> None:
        self.features, width = features, features.shape[1]
        self.projection = None
        if width > MAX_FEATURES:
            shape, generator = (width, MAX_FEATURES), seeds.generator(0, "projection")
            self.projection = torch.randn(shape, generator=generator) / MAX_FEATURES**0.5
        self.width, count = min(width, MAX_FEATURES), len(features)
        total = torch.zeros(self.width, dtype=torch.float64)
        for rows in self.blocks():
            total += self._raw(rows).sum(0, dtype=torch.float64)
        self.mean = total / count
        squares = torch.zeros_like(total)
        for rows in self.blocks():
            squares += (self._raw(rows) - self.mean).square_().sum(0)
        std = (squares / count).sqrt()
        self.inverse_std = torch.where(std > MIN_STD * self.mean.abs(), 1 / std, 0.0).nan_to_num(0, 0, 0).float()

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Returns rows as float32."""
        return self.centred(rows) * self.inverse_std

    def centred(self, rows: slice | Tensor) -> Tensor:
        """Returns rows as float32, centred only."""
        return (self._raw(rows) - self.mean).float()

    def blocks(self) -> list[slice]:
        step = max(1, BLOCK // self.features.shape[1])
        return [slice(start, start + step) for start in range(0, len(self), step)]

    def matrix(self, standardise: bool) -> Tensor:
        """Returns all rows, float32 [N, D]."""
        result = torch.empty(len(self), self.width)
        for rows in self.blocks():
            result[rows] = self[rows] if standardise else self.centred(rows)
        return result

    def compact(self, standardise: bool) -> Tensor:
        """Returns all rows, float32 [N, D]; above WIDE features, their COMPONENTS principal components instead."""
        if self.width <= WIDE:
            return self.matrix(standardise)
        covariance = torch.zeros(self.width, self.width, dtype=torch.float64)
        for rows in self.blocks():
            x = self[rows] if standardise else self.centred(rows)
            covariance += x.T @ x
        axes = torch.linalg.eigh(covariance).eigenvectors[:, -COMPONENTS:].float()
        parts = ((self[rows] if standardise else self.centred(rows)) @ axes for rows in self.blocks())
        return torch.cat(list(parts))

    def _raw(self, rows: slice | Tensor) -> Tensor:
        x = self.features[rows]
        return x.double() if self.projection is None else (x.float() @ self.projection).double()


def pool_features(
    features: Tensor, labels: Tensor, num_classes: int, model: Tensor | None = None, progress: Progress = silent
) -> Tensor:
    """Returns out-of-fold probabilities [N, C] from features, and from a model's probabilities if they are given.

    features: finite floats [N, D] on the CPU. labels: int64 [N], as given. model: [N, C] from a model that has not
    seen the labels. Sources are the ridge probe and the neighbours at every reach, by centred and by standardised
    features. The result is the mean of all sources, with the weights that predict the given labels best. The folds
    have a fixed seed. progress: called as stage "features".
    """
    progress("features", 0, 3)
    z = Standardised(features)
    sources = [ridge_probabilities(z, labels, num_classes)]
    progress("features", 1, 3)
    for step, standardise in ((2, False), (3, True)):
        sources += neighbour_probabilities(z.compact(standardise), labels, num_classes)
        progress("features", step, 3)
    return pool(sources if model is None else [model.float(), *sources], labels)


def pool(sources: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Returns the weighted mean of probabilities [N, C]; EM finds the weights of the highest likelihood (stacking)."""
    column = labels.unsqueeze(1)
    return mix(sources, pool_weights(torch.cat([p.gather(1, column) for p in sources], 1)))


def pool_weights(own: Tensor) -> Tensor:
    """Returns the weights [S] of S sources. own: [N, S], the probability that each source gives to the given label.

    The best source gets all weight if the pool is not clearly better: a pool is vaguer than its sources, and the noise
    channel finds fewer errors from vague probabilities.
    """
    own = own.clamp(min=1e-6)
    weight = torch.full((own.shape[1],), 1 / own.shape[1])
    for _ in range(POOL_STEPS):
        share = own * weight
        weight = (share / share.sum(1, keepdim=True)).mean(0)
    alone = own.log().mean(0)
    best = int(alone.argmax())
    if float((own @ weight).log().mean() - alone[best]) < POOL_GAIN:
        weight = torch.zeros_like(weight)
        weight[best] = 1
    return weight


def mix(sources: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Returns the weighted mean of probabilities [N, C]."""
    mean = torch.zeros_like(sources[0])
    for p, w in zip(sources, weights.tolist(), strict=True):
        mean.add_(p, alpha=w)
    return mean.div_(mean.sum(1, keepdim=True))


class Probe(NamedTuple):
    """Ridge regression for every penalty: scores are (z - mean) @ weights[penalty] + share.

    mean [D], weights [penalties, D, C], share [C]; float32.
    """

    mean: Tensor
    weights: Tensor
    share: Tensor


class Ridge(NamedTuple):
    """The fold of each sample int64 [N], the probe of each fold, and the chosen penalty and scale."""

    fold: Tensor
    probes: tuple[Probe, ...]
    penalty: int
    scale: float

    def __call__(self, x: Tensor, fold: Tensor) -> Tensor:
        """Returns the probabilities [n, C] of samples x [n, D], by the probes that have not seen their folds [n]."""
        result = torch.empty(len(x), len(self.probes[0].share))
        for f, probe in enumerate(self.probes):
            inside = fold == f
            scores = (x[inside] - probe.mean) @ probe.weights[self.penalty] + probe.share
            result[inside] = (self.scale * scores).softmax(1)
        return result


def ridge_probabilities(z: Standardised, labels: Tensor, num_classes: int) -> Tensor:
    """Returns out-of-fold probabilities [N, C] of ridge regression on one-hot labels, solved in closed form.

    The likelihood of the given labels chooses the penalty and the scale of the scores. Needs F (folds) matrices [D, D]
    in float64 and F x penalties matrices [D, C] in float32 beside the result.
    """
    ridge = fit_ridge(z, labels, num_classes)
    result = torch.empty(len(z), num_classes)
    for rows in z.blocks():
        result[rows] = ridge(z[rows], ridge.fold[rows])
    return result


def fit_ridge(z: Standardised, labels: Tensor, num_classes: int) -> Ridge:
    """Fits the probe of every fold, and chooses the penalty and the scale by the likelihood of the given labels."""
    fold = torch.randperm(len(z), generator=seeds.generator(0, "folds")) % min(FOLDS, len(z))
    probes = _fit_probes(z, labels, fold, num_classes)
    return Ridge(fold, tuple(probes), *_choose(z, labels, fold, probes))


def _fit_probes(z: Standardised, labels: Tensor, fold: Tensor, num_classes: int) -> list[Probe]:
    """Fits a probe for each fold on the samples of the other folds, in one pass over the features."""
    folds, width = int(fold.max()) + 1, z.width
    gram = torch.zeros(folds, width, width, dtype=torch.float64)
    sums = torch.zeros(folds, num_classes, width, dtype=torch.float64)  # of the features, by fold and label
    for rows in z.blocks():
        x, block_labels = z[rows], labels[rows]
        for f in range(folds):
            inside = fold[rows] == f
            part = x[inside]
            gram[f] += part.T @ part
            sums[f].index_add_(0, block_labels[inside], part.double())
    counts = torch.stack([labels[fold == f].bincount(minlength=num_classes) for f in range(folds)]).double()
    all_gram, all_sums, all_counts = gram.sum(0), sums.sum(0), counts.sum(0)
    return [_solve(all_gram - gram[f], all_sums - sums[f], all_counts - counts[f]) for f in range(folds)]


def _solve(gram: Tensor, sums: Tensor, counts: Tensor) -> Probe:
    """Returns the probe of training samples. gram: z^T z [D, D]. sums [C, D] and counts [C]: of each label."""
    count = counts.sum()
    mean = sums.sum(0) / count
    covariance = gram - count * torch.outer(mean, mean)
    right = sums.T - torch.outer(mean, counts)
    eigenvalue = covariance.diagonal().mean().clamp(min=1e-12)
    weights = []
    for penalty in PENALTIES:
        shifted = covariance.clone()
        shifted.diagonal().add_(penalty * eigenvalue)
        weights.append(torch.cholesky_solve(right, torch.linalg.cholesky(shifted)).float())
    return Probe(mean.float(), torch.stack(weights), (counts / count).float())


def _choose(z: Standardised, labels: Tensor, fold: Tensor, probes: Sequence[Probe]) -> tuple[int, float]:
    """Returns the index of the penalty, and the scale, under which the given labels are likeliest."""
    chosen = torch.randperm(len(z), generator=seeds.generator(0, "ridge"))[:SELECTION_SIZE].sort().values
    likelihood = torch.zeros(len(PENALTIES), len(SCALES), dtype=torch.float64)
    step = max(1, BLOCK // max(z.features.shape[1], probes[0].weights.shape[2]))
    for f, probe in enumerate(probes):
        for rows in chosen[fold[chosen] == f].split(step):
            x, column = z[rows] - probe.mean, labels[rows].unsqueeze(1)
            for number, weights in enumerate(probe.weights):
                scores = x @ weights + probe.share
                for k, scale in enumerate(SCALES):
                    likelihood[number, k] += (scale * scores).log_softmax(1).gather(1, column).double().sum()
    candidates = [
        (float(likelihood[number, k]), number, scale)
        for number in range(len(PENALTIES))
        for k, scale in enumerate(SCALES)
    ]
    return max(candidates)[1:]


def neighbour_probabilities(z: Tensor, labels: Tensor, num_classes: int) -> Iterator[Tensor]:
    """Yields for each reach the label shares [N, C] that every sample sees in its neighbours of the other folds."""
    share = (labels.bincount(minlength=num_classes) / len(labels)).clamp(min=1 / len(labels))
    for _, votes in neighbour_labels(affinity(z), labels, num_classes, 0):
        p = votes / votes.sum(1, keepdim=True).clamp(min=1e-12) + 0.01 * share  # for samples without neighbours
        yield p / p.sum(1, keepdim=True)
