"""The audit of features for sets whose N x C probabilities do not fit in memory.

The same sources, pool and noise channel as for small sets, in blocks of samples:
1. The ridge probe and the neighbours' graph are fitted in passes over the features, which may be memory-mapped.
2. Each sample keeps its TOP likeliest labels among its neighbours; this table is all that a second step needs.
3. The weights of the sources and the noise channel are fitted on a part of the samples, then applied to every block.
Several ranks share the search for neighbours and the last pass over all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf import seeds
from tadperf.compute import ranks
from tadperf.progress import Progress, silent
from tadperf.trust import probe
from tadperf.trust.approximate_neighbours import FeatureRows, Rows, approximate_neighbours, is_available
from tadperf.trust.channel import channel_odds, fit_channel
from tadperf.trust.correction import FittedPool, Likeliest, fit_pool, likeliest_class
from tadperf.trust.neighbours import NEIGHBOURS, REACHES, affinity, affinity_of, block_starts, nearest_in_block
from tadperf.trust.probe import Standardised
from tadperf.trust.top_classes import TopClasses, blocks_of, from_blocks

APPROXIMATE = 2**17  # samples from which faiss finds the neighbours: the exact search takes minutes there
TOP = 16  # labels that a sample keeps; NEIGHBOURS and as many that point to it have about 20 at most
BLOCK = 2**24  # samples x classes in a block: 64 MB; not tuned
WEIGHTED = 2**15  # samples that choose the weights of the sources; not tuned
FITTED = 2**25  # samples x classes on which the channel is fitted: 128 MB; not tuned


class Suspicion(NamedTuple):
    """Log odds [N] that each label is wrong, the likeliest other class int64 [N], and the likeliest class."""

    odds: Tensor
    other: Tensor
    likeliest: Likeliest


class Votes(NamedTuple):
    """The labels among the neighbours of each sample: up to TOP labels int32 [N, TOP] and their weights [N, TOP]."""

    labels: Tensor
    weights: Tensor


def suspicion_of_labels(
    features: Tensor | None, labels: Tensor, num_classes: int, model: Tensor | None = None, progress: Progress = silent
) -> Suspicion:
    """Fits all parts and returns how suspicious each label is (tadperf; top of this module).

    features: finite floats [N, D] on the CPU. labels: int64 [N], as given. model: probabilities [N, C] of a model that
    has not seen the labels. One of features and model may be None; both may be memory-mapped. Memory: about 2 N D bytes
    for the neighbours, if faiss finds them, and 0.5 KB a sample.
    progress: called as stages "features", "trust:graph" and "trust:labels".
    """
    sources = _Sources(features, labels, num_classes, model, progress)
    count = len(labels)
    order = torch.randperm(count, generator=seeds.generator(0, "large"))
    weights = sources.weights(order[: min(count, WEIGHTED)])
    fitted = order[: min(count, max(FITTED // num_classes, 2 * num_classes))]
    mixed = torch.cat([probe.mix(sources.rows(rows), weights) for rows in fitted.split(sources.step)])
    channel, pool = fit_channel(mixed, labels[fitted]), fit_pool(mixed, labels[fitted])
    del mixed

    def judge(rows: Tensor) -> Suspicion:
        p = probe.mix(sources.rows(rows), weights)
        return suspicion_of(p, labels[rows], channel_odds(channel, p, labels[rows]), pool)

    return _apply(judge, labels, num_classes, progress)


def feature_probabilities(
    features: Tensor, labels: Tensor, num_classes: int, progress: Progress = silent
) -> TopClasses:
    """Returns the out-of-fold probabilities that features give, as `pool_features` does for small sets."""
    sources, count = _Sources(features, labels, num_classes, None, progress), len(labels)
    weights = sources.weights(torch.randperm(count, generator=seeds.generator(0, "large"))[: min(count, WEIGHTED)])
    every = torch.arange(count)
    blocks = ((rows, probe.mix(sources.rows(every[rows]), weights)) for rows in blocks_of(count, num_classes))
    return from_blocks(blocks, count, num_classes, labels.device)


def _apply(judge: Callable[[Tensor], Suspicion], labels: Tensor, num_classes: int, progress: Progress) -> Suspicion:
    """Judges every block of samples; the ranks share the blocks."""
    count, step = len(labels), max(BLOCK // num_classes, 1)
    blocks = [torch.arange(start, min(start + step, count)) for start in range(0, count, step)]

    def work(assigned: Sequence[int]) -> Iterator[tuple[int, Suspicion]]:
        for place, number in enumerate(assigned):
            yield place, judge(blocks[number])

    parts: dict[int, Suspicion] = {}
    progress("trust:labels", 0, len(blocks))
    for number, part in ranks.divide_work(work, len(blocks)):
        parts[number] = part
        progress("trust:labels", len(parts), len(blocks))
    ordered = [parts[n] for n in range(len(blocks))]
    likeliest = Likeliest(*map(torch.cat, zip(*(part.likeliest for part in ordered), strict=True)))
    return Suspicion(torch.cat([part.odds for part in ordered]), torch.cat([part.other for part in ordered]), likeliest)


def suspicion_of(p: Tensor, labels: Tensor, odds: Tensor, pool: FittedPool) -> Suspicion:
    """Returns the suspicion of labels int64 [n] with probabilities p [n, C] and log odds [n] that they are wrong."""
    other = p.scatter(1, labels.unsqueeze(1), -1.0).argmax(1)
    return Suspicion(odds, other, likeliest_class(pool, p, labels))


class _Sources:
    """The probabilities of all sources for any rows."""

    def __init__(
        self, features: Tensor | None, labels: Tensor, num_classes: int, model: Tensor | None, progress: Progress
    ) -> None:
        self.labels, self.num_classes, self.model, self.features = labels, num_classes, model, features
        self.step = max(BLOCK // max(num_classes, 1 if features is None else features.shape[1]), 1)
        if features is None:
            return
        progress("features", 0, 2)
        self.z = Standardised(features)
        self.ridge = probe.fit_ridge(self.z, labels, num_classes)
        progress("features", 1, 2)
        self.graph = _graph(self.z, progress)
        self.votes = neighbour_votes(self.graph, labels, num_classes)
        self.share = (labels.bincount(minlength=num_classes) / len(labels)).clamp(min=1 / len(labels))
        progress("features", 2, 2)

    def rows(self, rows: Tensor) -> list[Tensor]:
        """Returns the probabilities [n, C] of every source."""
        model = [] if self.model is None else [self.model[rows].float()]
        if self.features is None:
            return model
        ridge = self.ridge(self.z[rows], self.ridge.fold[rows])
        votes = two_steps(self.graph, self.votes, self.labels, rows, self.num_classes)
        votes = votes / votes.sum(1, keepdim=True).clamp(min=1e-12) + 0.01 * self.share
        return [*model, ridge, votes / votes.sum(1, keepdim=True)]

    def own(self, rows: Tensor) -> Tensor:
        """Returns the probabilities that the sources give to the given labels, [n, sources]."""
        column = self.labels[rows].unsqueeze(1)
        return torch.cat([p.gather(1, column) for p in self.rows(rows)], 1)

    def weights(self, rows: Tensor) -> Tensor:
        """Returns the weights [sources] that predict the given labels of some samples best."""
        return probe.pool_weights(torch.cat([self.own(part) for part in rows.split(self.step)]))


def _graph(z: Standardised, progress: Progress) -> Tensor:
    """Returns the affinity S, sparse [N, N]; its neighbours are approximate in large sets if faiss is installed.

    Several ranks share the search; all of them must call this function.
    """
    return _approximate_graph(z, progress) if _is_approximate(len(z)) else _exact_graph(z.compact(True), progress)


def neighbour_graph(features: Tensor, progress: Progress) -> Tensor:
    """Returns the affinity S of features [N, D] as they are, sparse [N, N], on their device.

    On a CPU its neighbours are approximate in large sets if faiss is installed; on CUDA the exact search takes seconds.
    """
    if features.is_cuda:
        return affinity(features)
    if _is_approximate(len(features)):
        return _approximate_graph(FeatureRows(features), progress)
    return _exact_graph(features, progress)


def _is_approximate(count: int) -> bool:
    return count >= APPROXIMATE and is_available()


def _approximate_graph(rows: Rows, progress: Progress) -> Tensor:
    found = approximate_neighbours(rows, min(NEIGHBOURS, len(rows) - 1), progress)
    return affinity_of(found.similarity, found.indices.long())


def _exact_graph(features: Tensor, progress: Progress) -> Tensor:
    return affinity_of(*_exact_neighbours(features, min(NEIGHBOURS, len(features) - 1), progress))


def _exact_neighbours(features: Tensor, k: int, progress: Progress) -> tuple[Tensor, Tensor]:
    """Returns `nearest_neighbours`, whose blocks the ranks share."""
    z = F.normalize(features, dim=1)
    blocks = block_starts(z)

    def search(assigned: Sequence[int]) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        for place, number in enumerate(assigned):
            yield place, nearest_in_block(z, blocks[number], k)

    similarity, index = torch.empty(len(z), k), torch.empty(len(z), k, dtype=torch.int64)
    for finished, (number, part) in enumerate(ranks.divide_work(search, len(blocks)), 1):
        rows = slice(blocks[number], blocks[number] + blocks.step)
        similarity[rows], index[rows] = part
        progress("trust:graph", finished, len(blocks))
    return similarity, index


def _entries(graph: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the nonzero entries of some rows of a sparse matrix: place in `rows`, column and value."""
    start, stop = graph.crow_indices()[rows], graph.crow_indices()[rows + 1]
    length = stop - start
    place = torch.arange(len(rows), device=rows.device).repeat_interleave(length)
    entry = torch.arange(len(place), device=rows.device) - (length.cumsum(0) - length)[place] + start[place]
    return place, graph.col_indices()[entry], graph.values()[entry]


def neighbour_votes(graph: Tensor, labels: Tensor, num_classes: int) -> Votes:
    """Returns the TOP labels with the largest weight among the neighbours of each sample: rows of S Y."""
    count, top, device = len(labels), min(TOP, num_classes), labels.device
    votes = Votes(torch.empty(count, top, dtype=torch.int32, device=device), torch.empty(count, top, device=device))
    for rows in torch.arange(count, device=device).split(max(BLOCK // num_classes, 1)):
        place, column, value = _entries(graph, rows)
        block = torch.zeros(len(rows), num_classes, device=device)
        block.view(-1).index_add_(0, place * num_classes + labels[column], value)
        best = block.topk(top, 1)
        votes.labels[rows], votes.weights[rows] = best.indices.to(torch.int32), best.values
    return votes


def two_steps(graph: Tensor, votes: Votes, labels: Tensor, rows: Tensor, num_classes: int) -> Tensor:
    """Returns S Y + a S (S Y) for some rows, [n, C], without what comes back from a sample's own label.

    a is REACHES[0], as in `neighbours.neighbour_labels` for large sets.
    """
    place, column, value = _entries(graph, rows)
    own = labels[rows]
    result = torch.zeros(len(rows), num_classes, device=labels.device)
    flat = result.view(-1)
    target = (place * num_classes).unsqueeze(1) + votes.labels[column]
    flat.index_add_(0, target.flatten(), (REACHES[0] * value.unsqueeze(1) * votes.weights[column]).flatten())
    returned = torch.zeros(len(rows), device=labels.device).index_add_(0, place, value.square())
    result[torch.arange(len(rows), device=labels.device), own] -= REACHES[0] * returned
    result.clamp_(min=0)  # rounding, and neighbours with more than TOP labels
    flat.index_add_(0, place * num_classes + labels[column], value)
    return result
