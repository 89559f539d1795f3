"""Estimates the true classes from the labels of neighbours in feature space.

S is the symmetrically normalised graph of each sample's nearest neighbours. For a reach a in (0, 1), sample i sees the
labels in row i of sum_t a^t S^t Y (label spreading; Zhou et al., 2004). Normalised, this row is a distribution g_i over
the given labels. We model a given label as a true class that passed through a transition matrix T [true, given], and
estimate the true class by likelihood, not by the largest g (tadperf):

    P(k | i) ~ T_k,y_i exp(n sum_j g_ij log T_kj)

Example: a neighbourhood with 45 % label c, 55 % label c + 1 and no label c + 2 has class c, because class c + 1 would
also have produced labels c + 2. T, the reach a and n are estimated from the given labels alone. A neighbourhood counts
as n independent labels. g_i leaves out the labels of the sample's own fold, and we choose the a and n that predict y_i
best.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf import seeds
from tadperf.compute.work_progress import add_processed, reporting, work
from tadperf.progress import Progress, silent

# None of these constants was tuned.
NEIGHBOURS = 10
REACHES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
LABEL_COUNTS = (2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)  # candidates for n
SPREAD_STEPS = 100
MIN_POWER = 1e-4  # spreading with reach a stops where a^t falls below this
FOLDS = 5
PASSES = 5  # how often T and the classes are estimated in turn
PRIOR = 50.0  # pseudo-labels that pull each row of T towards a symmetric matrix
SYMMETRIC_PRIOR = 1e9  # large enough to make T symmetric
FLOOR = 0.01  # share of each row of T that is uniform, so that no label is impossible
MIN_MASS = 1e-12  # guards divisions by zero
SELECTION_SIZE = 2**20  # samples x classes used to choose reach and n
FOLD_SIZE = 2**25  # largest samples x classes x folds for the fold method: 128 MB, plus as much for every reach
CPU_BLOCK, CUDA_BLOCK = 2**24, 2**28  # similarities in a block: 64 MB, and 1 GB for large products on CUDA
REPORTED_SIZE = 2**16  # progress is reported from this number of samples x classes


class NeighbourEstimate(NamedTuple):
    """posterior [N, C] of the true class, transition [C, C] (true, given), the chosen reach and n (label_count)."""

    posterior: Tensor
    transition: Tensor
    reach: float
    label_count: float


def estimate_from_neighbours(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    seed: int,
    transition: bool = True,
    progress: Progress = silent,
) -> NeighbourEstimate:
    """Estimates the true classes from the neighbours' labels (tadperf; see the top of this module).

    features: float [N, D], compared by cosine. labels: int64 [N], as given. seed: for the folds and for the samples
    used to choose reach and n. transition: False keeps T symmetric, so that the most frequent label wins.
    progress: on larger sets, called as stage "trust:neighbours" after each step of spreading and each pair of reach and
    n.
    """
    report = _step_counter(progress, len(labels), num_classes)
    prior = PRIOR if transition else SYMMETRIC_PRIOR
    share = (labels.bincount(minlength=num_classes) / len(labels)).clamp(min=1 / len(labels))
    rows = torch.randperm(len(labels), generator=seeds.generator(seed, "rows"), device="cpu")
    rows = rows[: max(SELECTION_SIZE // num_classes, 1)].to(labels.device)
    best, best_score = None, -torch.inf
    with reporting(progress, "trust:nearest", work(len(labels))):
        graph = affinity(features)
    for reach, g in neighbour_labels(graph, labels, num_classes, seed, report):
        g.div_(g.sum(1, keepdim=True).clamp(min=MIN_MASS)).add_(1e-6 * share)
        g.div_(g.sum(1, keepdim=True))
        selected, row_labels = g[rows], labels[rows]
        start = confident_classes(selected / share)
        transitions, scores = [], []
        for label_count in LABEL_COUNTS:
            t, classes = fit_transition(selected, row_labels, start, label_count, prior)
            transitions.append(t)
            scores.append((classes @ t).gather(1, row_labels.unsqueeze(1)).log().mean())
            report()
        # One read for all counts: each read waits for the device.
        for label_count, t, score in zip(LABEL_COUNTS, transitions, torch.stack(scores).cpu().tolist(), strict=True):
            if score > best_score:
                best, best_score = (g, t, reach, label_count), score
    assert best is not None
    g, t, reach, label_count = best
    if len(rows) < len(labels):
        t = estimate_transition((g @ t.log().T).mul_(label_count).softmax(1), labels, prior)
    log_t = t.log()
    scores = (g @ log_t.T).mul_(label_count)
    del best, g  # [N, C] is 5 GB for 1.28 M samples and 1000 classes
    return NeighbourEstimate(scores.add_(log_t.T[labels]).softmax(1), t, reach, label_count)


def _step_counter(progress: Progress, count: int, num_classes: int) -> Callable[[], None]:
    """Returns a function that counts one step and reports it; it reports nothing for small sets."""
    if count * num_classes < REPORTED_SIZE:
        return lambda: None
    folds = _uses_folds(count, num_classes)
    total = SPREAD_STEPS + len(REACHES) * len(LABEL_COUNTS) if folds else len(LABEL_COUNTS)
    steps = itertools.count(1)
    progress("trust:neighbours", 0, total)
    return lambda: progress("trust:neighbours", next(steps), total)


def _uses_folds(count: int, num_classes: int) -> bool:
    """Returns whether FOLDS copies of [N, C] are small enough to hide the labels of each sample's fold."""
    return count * num_classes * FOLDS <= FOLD_SIZE


def neighbour_labels(
    graph: Tensor, labels: Tensor, num_classes: int, seed: int, step_done: Callable[[], None] = lambda: None
) -> Iterator[tuple[float, Tensor]]:
    """Yields each reach with the labels that every sample sees in the other samples, a new tensor [N, C].

    The labels of a sample's own fold are hidden from it. If FOLDS copies of [N, C] are too large, yields one reach
    only, with two steps of spreading, and subtracts exactly what comes from the sample's own label.
    """
    count = len(labels)
    if not _uses_folds(count, num_classes):
        yield REACHES[0], _two_steps(graph, labels, num_classes)
        return
    given = F.one_hot(labels, num_classes).float()
    fold = torch.randperm(count, generator=seeds.generator(seed, "folds"), device="cpu").to(labels.device) % FOLDS
    visible = torch.cat([given * (fold != f).unsqueeze(1) for f in range(FOLDS)], 1)
    for reach, votes in zip(REACHES, spread_labels(graph, visible, REACHES, step_done), strict=True):
        yield reach, votes.view(count, FOLDS, num_classes)[torch.arange(count, device=fold.device), fold]


def _two_steps(graph: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Returns S Y + a S (S Y) without what comes back from a sample's own label, [N, C]. a is REACHES[0]."""
    count, column = len(labels), labels.unsqueeze(1)
    one_step = graph @ torch.zeros(count, num_classes, device=labels.device).scatter_(1, column, 1.0)
    returned = torch.zeros(count, device=labels.device)
    squares, degree = graph.values().square(), graph.crow_indices().diff()
    row = torch.arange(count, device=labels.device).repeat_interleave(degree, output_size=len(squares))
    returned.index_add_(0, row, squares)
    two = (graph @ one_step).scatter_add_(1, column, -returned.unsqueeze(1))
    return two.mul_(REACHES[0]).add_(one_step)


def nearest_neighbours(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns cosine similarity and index, both [N, k], of each sample's nearest other samples. Exact, in blocks."""
    z = F.normalize(features, dim=1)
    blocks = [nearest_in_block(z, start, k) for start in block_starts(z)]
    values, index = zip(*blocks, strict=True)
    return torch.cat(values), torch.cat(index)


def block_starts(z: Tensor) -> range:
    """Returns the first row of every block of samples whose similarities to all samples fit in memory."""
    return range(0, len(z), max(1, (CUDA_BLOCK if z.is_cuda else CPU_BLOCK) // len(z)))


def nearest_in_block(z: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """Returns what `nearest_neighbours` does for the samples of one block. z: features [N, D] of length 1."""
    similarity = z[start : start + block_starts(z).step] @ z.T
    rows = torch.arange(len(similarity), device=z.device)
    similarity[rows, rows + start] = -2.0  # below every cosine: a sample is not its own neighbour
    top = similarity.topk(k, 1)
    add_processed(len(top.indices))
    return top.values, top.indices


def affinity(features: Tensor) -> Tensor:
    """Returns S = D^-1/2 (W + W^T) D^-1/2, sparse [N, N]. W holds similarity^3 of nearest neighbours (not tuned)."""
    return affinity_of(*nearest_neighbours(features, min(NEIGHBOURS, len(features) - 1)))


def affinity_of(similarity: Tensor, index: Tensor) -> Tensor:
    """Returns the S of `affinity` from the neighbours' cosine similarity and index, both [N, k]."""
    count = len(index)
    weight = similarity.clamp(min=0).pow(3).flatten()
    row = torch.arange(count, device=index.device).repeat_interleave(index.shape[1])
    edges = torch.stack([torch.cat([row, index.flatten()]), torch.cat([index.flatten(), row])])
    shape, options = (count, count), {"check_invariants": False, "device": weight.device}
    with warnings.catch_warnings():
        # PyTorch warns that its CSR format is in beta, and PyTorch 2.11 that coalesce checks nothing.
        warnings.simplefilter("ignore", UserWarning)
        graph = torch.sparse_coo_tensor(edges, weight.repeat(2), shape, **options).coalesce()
        (row, column), weight = graph.indices(), graph.values()
        degree = torch.zeros(count, device=weight.device).index_add_(0, row, weight).clamp(min=MIN_MASS)
        weight = weight / (degree[row] * degree[column]).sqrt()
        return torch.sparse_coo_tensor(graph.indices(), weight, shape, **options).to_sparse_csr()


def spread_labels(
    graph: Tensor, values: Tensor, reaches: tuple[float, ...], step_done: Callable[[], None] = lambda: None
) -> list[Tensor]:
    """Returns sum_t a^t S^t Y for every reach a, from one sequence of products. values: Y [N, K]."""
    sums = [values.clone() for _ in reaches]
    for step in range(1, SPREAD_STEPS + 1):
        values = graph @ values
        for reach, total in zip(reaches, sums, strict=True):
            if reach**step > MIN_POWER:
                total.add_(values, alpha=reach**step)
        step_done()
    return sums


def confident_classes(scores: Tensor) -> Tensor:
    """Returns one-hot rows [N, C] of the largest score, times its lead over the second (as shares of the row)."""
    top = (scores / scores.sum(1, keepdim=True)).topk(2, 1)
    lead = top.values[:, 0] - top.values[:, 1]
    return F.one_hot(top.indices[:, 0], scores.shape[1]) * lead.unsqueeze(1)


def fit_transition(g: Tensor, labels: Tensor, start: Tensor, label_count: float, prior: float) -> tuple[Tensor, Tensor]:
    """Estimates T [C, C] and the classes [N, C] in turn, from neighbour labels g and the first classes `start`."""
    classes, t = start, torch.empty(0)
    for _ in range(PASSES):
        t = estimate_transition(classes, labels, prior)
        classes = (label_count * (g @ t.log().T)).softmax(1)
    return t, classes


def estimate_transition(classes: Tensor, labels: Tensor, prior: float) -> Tensor:
    """Returns T [C, C], the shares of given labels by true class. classes: distributions [N, C]; labels: int64 [N].

    `prior` pseudo-labels per row pull T towards a symmetric matrix. The diagonal is raised to the largest entry of its
    row: the classes can be identified only if the given label is the most likely one.
    """
    num = classes.shape[1]
    counts = torch.zeros(num, num, dtype=classes.dtype, device=classes.device).index_add_(0, labels, classes)
    return transition_of_counts(counts, prior)


def transition_of_counts(counts: Tensor, prior: float) -> Tensor:
    """Returns the T of `estimate_transition`. counts: [C, C], the sums of the distributions by given label."""
    counts, num = counts.T, len(counts)
    right = (counts.trace() / counts.sum().clamp(min=MIN_MASS)).clamp(1 / num, 1).double()  # not read on the CPU
    wrong = ((1 - right) / (num - 1)).to(counts.dtype)
    base = torch.where(torch.eye(num, dtype=torch.bool, device=counts.device), right.to(counts.dtype), wrong)
    t = counts + prior * base
    t = t / t.sum(1, keepdim=True)
    t.diagonal().copy_(t.amax(1))
    return (1 - FLOOR) * t / t.sum(1, keepdim=True) + FLOOR / num
