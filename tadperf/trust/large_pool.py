"""The pool of a round's sources for sets whose N x C probabilities do not fit in memory.

The same steps as in `posterior` and `neighbours`, in blocks of samples. Each source keeps the likeliest classes of each
sample (`top_classes`). The weights of the sources are fitted on a part of the samples, as for small sets. Every pass
over all samples makes the probabilities of a block again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.config import TrustConfig
from tadperf.progress import Progress
from tadperf.trust import neighbours
from tadperf.trust.large_audit import neighbour_graph, neighbour_votes, two_steps
from tadperf.trust.neighbours import LABEL_COUNTS, PRIOR, SYMMETRIC_PRIOR, transition_of_counts
from tadperf.trust.posterior import MIN_LOG, PASSES, fit_weights, fitted_rows, posterior_of
from tadperf.trust.proxies import ProxyOutputs
from tadperf.trust.signals import check_shapes, label_loss
from tadperf.trust.top_classes import (
    Probabilities,
    TopClasses,
    blocks_of,
    dense_rows,
    from_blocks,
    no_classes,
)

MIN_PROBABILITY = 1e-13  # of a class, before the logarithm


class TopPool(NamedTuple):
    """What `ClassPool` holds, without [N, C].

    posterior: the likeliest classes. blind: int64 [N], the likeliest class without the own label. given: [N], the
    posterior of the given label. weights [S], transition [C, C].
    """

    posterior: TopClasses
    blind: Tensor
    given: Tensor
    weights: tuple[float, ...]
    transition: Tensor

    def blind_class(self) -> Tensor:
        """Returns the likeliest class without the own label, int64 [N]."""
        return self.blind

    def given_probability(self, labels: Tensor) -> Tensor:
        """Returns the probability [N] of the given labels."""
        return self.given

    def take_targets(self, strength: Tensor) -> TopClasses:
        """Returns the posterior times a strength [N]."""
        return self.posterior.scaled(strength)


class LargeSources(NamedTuple):
    """The pool, and the loss [N] of the given labels for each source."""

    pool: TopPool
    losses: list[Tensor]


def pool_large_sources(
    outputs: ProxyOutputs,
    given: Tensor,
    classes: int,
    seed: int,
    config: TrustConfig,
    progress: Progress,
    evidence: tuple[Probabilities, ...],
    fitted: bool,
) -> LargeSources:
    """Pools the proxies, the neighbours (with `config.graph`) and the evidence. Arguments as for `weigh_sources`."""
    check_shapes(evidence, len(given), classes)
    sources, losses = [outputs.probabilities], [outputs.losses]
    for source in evidence:
        sources.append(source)
        losses.append(_loss_in_blocks(source, given))
    if config.graph:
        source, loss = neighbour_source(outputs.features, given, classes, seed, config.transition, progress)
        sources.append(source)
        losses.append(loss)
    return LargeSources(pool_top_classes(sources, given, seed, config.transition, fitted), losses)


def _loss_in_blocks(source: Probabilities, given: Tensor) -> Tensor:
    parts = [
        label_loss(dense_rows(source, rows).to(given.device, torch.float32), given[rows])
        for rows in blocks_of(*source.shape)
    ]
    return torch.cat(parts)


def neighbour_source(
    features: Tensor, labels: Tensor, classes: int, seed: int, transition: bool, progress: Progress
) -> tuple[TopClasses, Tensor]:
    """Returns the classes by the neighbours alone, and the loss [N] of the given labels with them.

    As `estimate_from_neighbours` and `without_own_label`. Large sets have one reach only.
    """
    count, prior = len(labels), PRIOR if transition else SYMMETRIC_PRIOR
    share = (labels.bincount(minlength=classes) / count).clamp(min=1 / count)
    graph = neighbour_graph(features, progress)
    votes = neighbour_votes(graph, labels, classes)

    def shares(rows: Tensor) -> Tensor:
        g = two_steps(graph, votes, labels, rows, classes)
        g.div_(g.sum(1, keepdim=True).clamp(min=neighbours.MIN_MASS)).add_(1e-6 * share)
        return g.div_(g.sum(1, keepdim=True))

    rows = torch.randperm(count, generator=seeds.generator(seed, "rows"), device="cpu")
    rows = rows[: max(neighbours.SELECTION_SIZE // classes, 1)].to(labels.device)
    t, label_count = _choose_count(shares(rows), labels[rows], share, prior)
    every = torch.arange(count, device=labels.device)
    blocks = blocks_of(count, classes)
    if len(rows) < count:
        t = _transition(lambda block: _scores(shares(every[block]), t, label_count).softmax(1), labels, blocks, prior)
    source, loss = no_classes(count, classes, labels.device), torch.empty(count, device=labels.device)
    for number, block in enumerate(blocks, 1):
        scores = _scores(shares(every[block]), t, label_count)
        source.write(block, scores.softmax(1))
        loss[block] = label_loss(scores.add_(t.log().T[labels[block]]).softmax(1), labels[block])
        progress("trust:neighbours", number, len(blocks))
    return source, loss


def _scores(g: Tensor, t: Tensor, label_count: float) -> Tensor:
    return (g @ t.log().T).mul_(label_count)


def _choose_count(g: Tensor, labels: Tensor, share: Tensor, prior: float) -> tuple[Tensor, float]:
    """Returns T and n under which the neighbours predict the labels best. g: shares [n, C] of some samples."""
    start, best, best_score = neighbours.confident_classes(g / share), (torch.empty(0), LABEL_COUNTS[0]), -torch.inf
    for label_count in LABEL_COUNTS:
        t, classes = neighbours.fit_transition(g, labels, start, label_count, prior)
        score = float((classes @ t).gather(1, labels.unsqueeze(1)).log().mean())
        if score > best_score:
            best, best_score = (t, label_count), score
    return best


def _transition(classes_of: Callable[[slice], Tensor], labels: Tensor, blocks: Sequence[slice], prior: float) -> Tensor:
    """Returns the T of `estimate_transition`. classes_of: returns the distributions [n, C] of a block."""
    counts: Tensor | None = None
    for block in blocks:
        classes = classes_of(block)
        counts = torch.zeros(classes.shape[1], classes.shape[1], device=labels.device) if counts is None else counts
        counts.index_add_(0, labels[block], classes)
    assert counts is not None
    return transition_of_counts(counts, prior)


def pool_top_classes(
    sources: Sequence[Probabilities], labels: Tensor, seed: int, transition: bool = True, fitted: bool = True
) -> TopPool:
    """Pools the sources as `pool_classes` does. sources: probabilities [N, C], or their likeliest classes."""
    count, classes = sources[0].shape
    prior = PRIOR if transition else SYMMETRIC_PRIOR
    rows = fitted_rows(count, classes, seed)
    chosen = slice(None) if rows is None else rows.to(labels.device)
    logs = torch.stack([_logs(source, chosen, labels.device) for source in sources]).cpu().double()
    weights, t = fit_weights(logs, labels[chosen].cpu(), prior, fitted)
    del logs
    t, blocks = t.float().to(labels.device), blocks_of(count, classes)

    def blind_of(block: slice) -> Tensor:
        scores = torch.zeros(block.stop - block.start, classes, device=labels.device)
        for source, weight in zip(sources, weights.tolist(), strict=True):
            scores.add_(_logs(source, block, labels.device), alpha=weight)
        return scores.softmax(1)

    for _ in range(0 if rows is None else PASSES):
        before = t
        t = _transition(lambda block: posterior_of(blind_of(block), before, labels[block]), labels, blocks, prior)  # noqa: B023 - used at once
    blind, given = torch.empty_like(labels), torch.empty(count, device=labels.device)

    def posteriors() -> Iterator[tuple[slice, Tensor]]:
        for block in blocks:
            q = blind_of(block)
            p = posterior_of(q, t, labels[block])
            blind[block], given[block] = q.argmax(1), p.gather(1, labels[block].unsqueeze(1)).squeeze(1)
            yield block, p

    posterior = from_blocks(posteriors(), count, classes, labels.device)
    return TopPool(posterior, blind, given, tuple(weights.tolist()), t)


def _logs(source: Probabilities, rows: slice | Tensor, device: torch.device) -> Tensor:
    """Returns the log probabilities [n, C] of some samples."""
    p = dense_rows(source, rows).to(device, torch.float32)
    return p.clamp(min=MIN_PROBABILITY).log_().clamp_(min=MIN_LOG)
