"""Nearest neighbours in large sets, by faiss (extra `large`): approximate, with a measured recall.

Faiss compares each sample with the samples of the nearest of 4 sqrt(N) clusters, at most 2048, by 4-bit codes, and the
best of those by float16 features (Johnson et al., arXiv 1702.08734; Andre et al., arXiv 1812.09162).

Several ranks share the search, and each holds all samples. With 40 000 samples of 512 features, a CPU adds a sample in
23 us and searches its neighbours in 53 to 246 us.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf import seeds
from tadperf.compute import ranks
from tadperf.errors import UserError
from tadperf.progress import Progress, silent

log = logging.getLogger(__name__)

RECALL = 0.95  # the search tries harder until it reaches this share of the true neighbours
PROBES = 500  # samples whose true neighbours are found, too; the recall's standard error is then below 0.01
# (clusters searched, candidates compared by float16 features for each neighbour), from fast to thorough. With 400 000
# samples of 512 features in 1000 classes: recall 0.72, 0.905, 0.996, 0.999; 172, 209, 283, 454 CPU us a sample.
EFFORTS = ((4, 8), (4, 16), (8, 32), (16, 64), (32, 128), (64, 256), (256, 512))
Effort = tuple[int, int]
CODE_WIDTH = 8  # features in one 4-bit code; not tuned
SAMPLES_PER_CLUSTER = 39  # that train the clusters: the fewest that faiss takes without a warning
ITERATIONS = 6  # of the training of the clusters; not tuned
BLOCK = 2**14  # samples added or searched at a time; not tuned


class Rows(Protocol):
    """Features [N, D], of which rows are read as float32."""

    width: int

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice | Tensor) -> Tensor: ...


class FeatureRows:
    """The `Rows` of a tensor [N, D] of any float type."""

    def __init__(self, features: Tensor) -> None:
        self.features, self.width = features, features.shape[1]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self.features[rows].float()


class Neighbours(NamedTuple):
    """similarity (cosine) and indices of each sample's nearest other samples, both [N, k], and the measured recall."""

    similarity: Tensor
    indices: Tensor
    recall: float


def is_available() -> bool:
    """Returns whether faiss is installed."""
    return importlib.util.find_spec("faiss") is not None


def approximate_neighbours(features: Rows, k: int, progress: Progress = silent) -> Neighbours:
    """Returns the k nearest other samples of every sample by cosine, approximately (top of this module).

    Memory in each rank: 2 N D bytes for float16 features, 8 N k for the result. One seed gives one result, with any
    number of ranks; all ranks must call this function. Logs the recall that PROBES samples show.
    progress: called as stage "trust:graph". Raises UserError without faiss.
    """
    if not is_available():
        raise UserError("features", f"{len(features)} samples", "needs faiss; install tadperf[large]", topic="extras")
    import faiss

    count, blocks = len(features), range(0, len(features), BLOCK)
    total = 2 * len(blocks) + 1
    progress("trust:graph", 0, total)
    index = _train_once(faiss, features)
    progress("trust:graph", 1, total)
    probes = torch.randperm(count, generator=seeds.generator(0, "recall"))[:PROBES].sort().values
    truth = _ExactSearch(F.normalize(features[probes], dim=1), probes, k)
    for number, start in enumerate(blocks):
        block = F.normalize(features[slice(start, start + BLOCK)], dim=1)
        index.add(block.numpy())
        truth.add(block, start)
        progress("trust:graph", 2 + number, total)
    effort, recall = ranks.once(lambda: _choose_effort(faiss, index, truth, probes, k))
    log.info("neighbours: recall %.3f, %d of %d clusters searched", recall, effort[0], _clusters(count))

    def search(assigned: Sequence[int]) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        for place, number in enumerate(assigned):
            own = torch.arange(blocks[number], min(blocks[number] + BLOCK, count))
            queries = F.normalize(features[slice(blocks[number], blocks[number] + BLOCK)], dim=1)
            yield place, _search(faiss, index, queries, own, k, effort)

    similarity, found = torch.empty(count, k), torch.empty(count, k, dtype=torch.int32)
    for finished, (number, part) in enumerate(ranks.divide_work(search, len(blocks))):
        rows = slice(blocks[number], blocks[number] + BLOCK)
        similarity[rows], found[rows] = part
        progress("trust:graph", 2 + len(blocks) + finished, total)
    return Neighbours(similarity, found, recall)


def _clusters(count: int) -> int:
    """Returns the number of clusters: a power of 2, at most 4 sqrt(N), at most 2048 because training takes time."""
    return 2 ** min(int(4 * count**0.5).bit_length() - 1, 11)


def _train_once(faiss: Any, features: Rows) -> Any:
    """Returns the trained index; several ranks get copies of that of rank 0."""
    if ranks.world_size() == 1:
        return _train(faiss, features)
    return faiss.deserialize_index(ranks.once(lambda: faiss.serialize_index(_train(faiss, features))))


def _train(faiss: Any, features: Rows) -> Any:
    """Returns an index without samples, with clusters and codes trained on some samples."""
    count, clusters = len(features), _clusters(len(features))
    codes = max(d for d in range(1, features.width // CODE_WIDTH + 2) if features.width % d == 0)
    kind = f"IVF{clusters},PQ{codes}x4fs,Refine(SQfp16)"
    index = faiss.index_factory(features.width, kind, faiss.METRIC_INNER_PRODUCT)
    ivf = faiss.extract_index_ivf(index)
    ivf.cp.niter, ivf.cp.seed, ivf.cp.max_points_per_centroid = ITERATIONS, 0, SAMPLES_PER_CLUSTER
    size = min(count, SAMPLES_PER_CLUSTER * clusters)
    chosen = torch.randperm(count, generator=seeds.generator(0, "clusters"))[:size].sort().values
    index.train(F.normalize(features[chosen], dim=1).numpy())
    return index


class _ExactSearch:
    """The true neighbours of a few samples, found while blocks of all samples pass."""

    def __init__(self, queries: Tensor, own: Tensor, k: int) -> None:
        self.queries, self.own, self.k = queries, own, k
        self.values = torch.empty(len(own), 0)
        self.index = torch.empty(len(own), 0, dtype=torch.int64)

    def add(self, block: Tensor, start: int) -> None:
        similarity = self.queries @ block.T
        inside = ((self.own >= start) & (self.own < start + len(block))).nonzero().squeeze(1)
        similarity[inside, self.own[inside] - start] = -2.0  # below every cosine
        top = similarity.topk(min(self.k, len(block)), 1)
        values, index = torch.cat([self.values, top.values], 1), torch.cat([self.index, top.indices + start], 1)
        self.values, place = values.topk(min(self.k, values.shape[1]), 1)
        self.index = index.gather(1, place)


def _choose_effort(faiss: Any, index: Any, truth: _ExactSearch, probes: Tensor, k: int) -> tuple[Effort, float]:
    """Returns the least effort that reaches RECALL, or the largest one, with its recall."""
    effort, recall = EFFORTS[0], 0.0
    for effort in EFFORTS:
        similarity, _ = _search(faiss, index, truth.queries, probes, k, effort)
        # By similarity: among equal samples each is a true neighbour. float16 features give errors of about 2e-5.
        recall = float((similarity >= truth.values[:, -1:] - 1e-4).float().mean())
        if recall >= RECALL:
            break
    return effort, recall


def _search(faiss: Any, index: Any, queries: Tensor, own: Tensor, k: int, effort: Effort) -> tuple[Tensor, Tensor]:
    """Returns similarity and index [n, k] of the nearest samples; `own` [n] are the samples of the queries."""
    clusters, factor = effort
    inner = faiss.SearchParametersIVF(nprobe=clusters)
    parameters = faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=inner)
    similarity, found = map(torch.from_numpy, index.search(queries.numpy(), k + 1, params=parameters))
    # The sample itself is normally the first; among equal samples it may stand elsewhere or be missing. Where faiss
    # finds fewer than k, it returns -1: such a neighbour becomes the sample itself with similarity 0.
    is_own = found == own.unsqueeze(1)
    missing = found < 0
    order = (is_own | missing).to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
    unusable = (is_own | missing).gather(1, order)
    similarity = similarity.gather(1, order).masked_fill(unusable, 0.0).clamp(-1, 1)
    return similarity, torch.where(unusable, own.unsqueeze(1), found.gather(1, order)).to(torch.int32)
