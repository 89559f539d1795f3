"""Labels spread over the neighbours in feature space, and what they say of the true classes.

S is the symmetrically normalised graph of each sample's nearest neighbours. For a reach a in (0, 1), the labels that
sample i sees are row i of sum_t a^t S^t Y (label spreading; Zhou et al., 2004), normalised to a distribution g_i over
the given labels. Given labels are true ones sent through a transition matrix T [true, given], so the true class is read
by likelihood, not by the largest g (tadperf):

    P(k | i) ~ T_k,y_i exp(n sum_j g_ij log T_kj)

A neighbourhood that holds 45 % label c, 55 % label c + 1 and none of c + 2 is of class c where class c + 1 would have
leaked into c + 2. T, the reach a, and n, how many independent labels a neighbourhood is worth, are estimated from the
given labels alone: g_i leaves out the labels of the sample's own fold, and the a and n that predict y_i best are taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf import seeds

NEIGHBOURS = 10
REACHES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
WORTHS = (2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
STEPS = 100  # of the spreading
FOLDS = 5
PASSES = 5  # of T and the classes in turn
PRIOR = 50.0  # labels by which each row of T is drawn to a symmetric matrix
SYMMETRIC = 1e9  # the same, for a T that is symmetric
ROWS = 2**20  # samples times classes on which reach and worth are chosen
LARGE = 2**25  # samples times classes times folds; 128 MB, and as much for every reach
FLOOR = 0.01  # of T's mass is uniform: no label is impossible
BLOCK = 2**24  # elements of a block of similarities, 64 MB


class NeighbourEstimate(NamedTuple):
    """posterior [N, C] of the true class, transition [C, C] (true, given), and the reach and worth that were chosen."""

    posterior: Tensor
    transition: Tensor
    reach: float
    worth: float


def estimate_from_neighbours(
    features: Tensor, labels: Tensor, num_classes: int, seed: int, transition: bool = True
) -> NeighbourEstimate:
    """The true classes as the neighbours' labels tell them (see this module's first lines).

    features: float [N, D], compared by cosine. labels: int64 [N], the given ones. seed: of folds and draws.
    transition: without it T stays symmetric, and the most frequent label wins.
    """
    share = (labels.bincount(minlength=num_classes) / len(labels)).clamp(min=1 / len(labels))
    rows = torch.randperm(len(labels), generator=seeds.generator(seed, "rows")).to(labels.device)
    rows = rows[: max(ROWS // num_classes, 1)]  # that choose; all of them but where the classes are many
    best, best_score = None, -torch.inf
    for reach, seen in others_labels(affinity(features), labels, num_classes, seed):
        seen = seen / seen.sum(1, keepdim=True).clamp(min=1e-12) + 1e-6 * share
        g = seen / seen.sum(1, keepdim=True)
        own, start = labels[rows], confident(g[rows] / share)
        for worth in WORTHS:
            t, classes = alternate(g[rows], own, start, worth, transition)
            score = float((classes @ t).gather(1, own.unsqueeze(1)).log().mean())
            if score > best_score:
                best, best_score = (g, t, reach, worth), score
    assert best is not None
    g, t, reach, worth = best
    if len(rows) < len(labels):
        t = estimate_transition((worth * (g @ t.log().T)).softmax(1), labels, PRIOR if transition else SYMMETRIC)
    log_t = t.log()
    return NeighbourEstimate((worth * (g @ log_t.T)).add_(log_t.T[labels]).softmax(1), t, reach, worth)


def others_labels(graph: Tensor, labels: Tensor, num_classes: int, seed: int) -> Iterator[tuple[float, Tensor]]:
    """For every reach, how much of each label a sample sees in others, [N, C].

    The labels of its own fold are hidden from a sample. Where FOLDS copies of [N, C] are too large, two hops have to
    do, from which the sample's own label is taken away exactly.
    """
    count = len(labels)
    given = F.one_hot(labels, num_classes).float()
    if count * num_classes * FOLDS > LARGE:
        once = graph @ given
        back = torch.zeros(count, device=labels.device)
        row = torch.repeat_interleave(torch.arange(count, device=labels.device), graph.crow_indices().diff())
        back.index_add_(0, row, graph.values().square())
        yield REACHES[0], once + REACHES[0] * (graph @ once - back.unsqueeze(1) * given)
        return
    fold = torch.randperm(count, generator=seeds.generator(seed, "folds")).to(labels.device) % FOLDS
    shown = torch.cat([given * (fold != f).unsqueeze(1) for f in range(FOLDS)], 1)
    for reach, seen in zip(REACHES, spread(graph, shown, REACHES), strict=True):
        yield reach, seen.view(count, FOLDS, num_classes)[torch.arange(count, device=fold.device), fold]


def nearest_neighbours(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity and index [N, k] of each sample's nearest other samples, exact, in blocks."""
    z = F.normalize(features, dim=1)
    step = max(1, BLOCK // len(z))
    values, index = [], []
    for start in range(0, len(z), step):
        similarity = z[start : start + step] @ z.T
        rows = torch.arange(len(similarity), device=z.device)
        similarity[rows, rows + start] = -2.0
        top = similarity.topk(k, 1)
        values.append(top.values)
        index.append(top.indices)
    return torch.cat(values), torch.cat(index)


def affinity(features: Tensor) -> Tensor:
    """S, sparse [N, N]: D^-1/2 (W + W^T) D^-1/2 over the nearest neighbours, their weight similarity^3."""
    count = len(features)
    similarity, index = nearest_neighbours(features, min(NEIGHBOURS, count - 1))
    weight = similarity.clamp(min=0).pow(3).flatten()
    row = torch.arange(count, device=index.device).repeat_interleave(index.shape[1])
    both = torch.stack([torch.cat([row, index.flatten()]), torch.cat([index.flatten(), row])])
    graph = torch.sparse_coo_tensor(both, weight.repeat(2), (count, count), check_invariants=False).coalesce()
    (row, column), weight = graph.indices(), graph.values()
    degree = torch.zeros(count, device=weight.device).index_add_(0, row, weight).clamp(min=1e-12)
    weight = weight / (degree[row] * degree[column]).sqrt()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch calls its CSR format beta
        return torch.sparse_coo_tensor(graph.indices(), weight, graph.shape, check_invariants=False).to_sparse_csr()


def spread(graph: Tensor, values: Tensor, reaches: tuple[float, ...]) -> list[Tensor]:
    """sum_t a^t S^t Y for every reach a, over one sequence of products; values [N, K]."""
    sums = [values.clone() for _ in reaches]
    for step in range(1, STEPS + 1):
        values = graph @ values
        for a, total in zip(reaches, sums, strict=True):
            if a**step > 1e-4:
                total.add_(values, alpha=a**step)
    return sums


def confident(scores: Tensor) -> Tensor:
    """Each row's largest score as a one-hot row, weighted by its lead over the second, both as shares of the row."""
    top = (scores / scores.sum(1, keepdim=True)).topk(2, 1)
    lead = top.values[:, 0] - top.values[:, 1]
    return F.one_hot(top.indices[:, 0], scores.shape[1]) * lead.unsqueeze(1)


def alternate(g: Tensor, labels: Tensor, start: Tensor, worth: float, transition: bool) -> tuple[Tensor, Tensor]:
    """T and the classes [N, C] that the others' labels g tell, in turn from the classes `start`."""
    classes, t = start, torch.empty(0)
    for _ in range(PASSES):
        t = estimate_transition(classes, labels, PRIOR if transition else SYMMETRIC)
        classes = (worth * (g @ t.log().T)).softmax(1)
    return t, classes


def estimate_transition(classes: Tensor, labels: Tensor, prior: float) -> Tensor:
    """T [C, C], the share of each given label in each true class; classes [N, C] as distributions, labels int64 [N].

    Drawn to a symmetric matrix by `prior` labels a row, and its diagonal raised to the row's largest entry: that the
    given label is the most likely one is what makes classes identifiable at all.
    """
    num = classes.shape[1]
    counts = torch.zeros(num, num, device=classes.device).index_add_(0, labels, classes).T
    right = float((counts.trace() / counts.sum().clamp(min=1e-12)).clamp(1 / num, 1))
    base = torch.full_like(counts, (1 - right) / (num - 1)).fill_diagonal_(right)
    t = counts + prior * base
    t = t / t.sum(1, keepdim=True)
    t.diagonal().copy_(t.amax(1))
    return (1 - FLOOR) * t / t.sum(1, keepdim=True) + FLOOR / num
