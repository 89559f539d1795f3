"""The probability of each class of every sample, from several sources that are weighted by estimate (tadperf).

Source s gives sample i the distribution p_s(k | i), which has not seen the given label y_i. With weights w_s >= 0 and
a transition matrix T [true, given]:

    q(k | i) ~ prod_s p_s(k | i)^w_s        P(y_i | i) = sum_k q(k | i) T_k,y_i        P(k | i, y_i) ~ q(k | i) T_k,y_i

Weights and T maximise the likelihood of the given labels: T by EM, the weights by Newton steps. So a source that tells
nothing gets no weight, and an overconfident one a small weight. A prior keeps the weights near PRIOR_WEIGHT where the
labels say little: on 1400 digits the likelihood alone gave the proxies no weight in half of the rounds, also where they
were nearly always right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.trust.neighbours import PRIOR, SYMMETRIC_PRIOR, NeighbourEstimate, estimate_transition

# None of these constants was tuned.
SELECTION_SIZE = 2**19  # samples x classes used to fit the weights, or two samples per class if that is more
FIT_STEPS = 100  # most steps of the fit; it ends earlier if a step gains less than MIN_GAIN
MIN_GAIN = 1e-10  # nats per sample; so small that CUDA and CPU end at the same weights
MAX_WEIGHT = 10.0
PRIOR_WEIGHT, PRIOR_DEVIATION = 0.5, 0.25  # of a source's weight, normal
RIDGE = 1e-2  # of the Newton step, as a share of the mean curvature
PASSES = 3  # how often T and the classes are estimated in turn on all samples, if the fit took only some
MIN_LOG = -30.0  # of a source's log probability
START_RIGHT = 0.7  # share of right labels before the first step


class ClassPool(NamedTuple):
    """posterior [N, C] of the true class; blind [N, C]: q, without the own label; weights [S]; transition [C, C]."""

    posterior: Tensor
    blind: Tensor
    weights: tuple[float, ...]
    transition: Tensor

    def blind_class(self) -> Tensor:
        """Returns the likeliest class without the own label, int64 [N]."""
        return self.blind.argmax(1)

    def given_probability(self, labels: Tensor) -> Tensor:
        """Returns the probability [N] of the given labels int64 [N]."""
        return self.posterior.gather(1, labels.unsqueeze(1)).squeeze(1)

    def take_targets(self, strength: Tensor) -> Tensor:
        """Returns the posterior times a strength [N], written over the posterior: [N, C] is large."""
        return self.posterior.mul_(strength.unsqueeze(1))


def pool_classes(
    sources: Sequence[Tensor], labels: Tensor, seed: int, transition: bool = True, fitted: bool = True
) -> ClassPool:
    """Pools log probabilities [N, C] of the sources (see the top of this module). labels: int64 [N], as given.

    seed: for the samples that the fit takes. transition: False keeps T symmetric. fitted: False gives each source
    weight 1 (for sources that have seen the given labels, whose likelihood says nothing).
    """
    count, classes = sources[0].shape
    prior = PRIOR if transition else SYMMETRIC_PRIOR
    rows = fitted_rows(count, classes, seed)
    selected, given = list(sources), labels
    if rows is not None:
        rows = rows.to(labels.device)
        selected, given = [source[rows] for source in sources], labels[rows]
    # On the CPU, because each step needs the result of the last one, and a GPU would have to be waited for. In float64,
    # so that the line search decides in the same way for the rounding of CPU and CUDA.
    logs = torch.stack(selected).cpu().double().clamp(min=MIN_LOG)
    weights, t = fit_weights(logs, given.cpu(), prior, fitted)
    t = t.float().to(labels.device)
    scores = torch.zeros(count, classes, device=labels.device)
    for source, weight in zip(sources, weights.tolist(), strict=True):
        scores.add_(source.clamp(min=MIN_LOG), alpha=weight)
    blind = scores.softmax(1)
    del scores
    if rows is not None:
        for _ in range(PASSES):
            t = estimate_transition(posterior_of(blind, t, labels), labels, prior)
    return ClassPool(posterior_of(blind, t, labels), blind, tuple(weights.tolist()), t)


def fitted_rows(count: int, classes: int, seed: int) -> Tensor | None:
    """Returns the samples that the fit takes, int64 on the CPU; None means all."""
    size = max(SELECTION_SIZE // classes, 2 * classes)
    if size >= count:
        return None
    return torch.randperm(count, generator=seeds.generator(seed, "pool"), device="cpu")[:size]


def fit_weights(sources: Tensor, labels: Tensor, prior: float, fitted: bool = True) -> tuple[Tensor, Tensor]:
    """Returns the weights [S] and T [C, C] of the highest likelihood.

    sources: log probabilities [S, N, C], on the CPU. prior: as for `estimate_transition`. The prior of the weights
    counts as part of the likelihood. A Newton step that would lower it is halved.
    """
    classes = sources.shape[2]
    weights = torch.full((len(sources),), PRIOR_WEIGHT if fitted else 1.0, dtype=sources.dtype, device="cpu")
    wrong = (1 - START_RIGHT) / max(classes - 1, 1)
    t = torch.full((classes, classes), wrong, dtype=sources.dtype, device="cpu").fill_diagonal_(START_RIGHT)
    blind, likelihood = _likelihood(sources, labels, weights, t)
    for _ in range(FIT_STEPS):
        before = likelihood
        t = estimate_transition(posterior_of(blind, t, labels), labels, prior)
        blind, likelihood = _likelihood(sources, labels, weights, t)
        step = (
            _newton_step(sources, weights, blind, posterior_of(blind, t, labels))
            if fitted
            else torch.zeros_like(weights)
        )
        for scale in (2.0, 1.0, 0.5, 0.25, 0.1) if fitted else ():  # EM's steps are short: twice the step mostly holds
            moved = (weights + scale * step).clamp(0, MAX_WEIGHT)
            found, value = _likelihood(sources, labels, moved, t)
            if value > likelihood:
                weights, blind, likelihood = moved, found, value
                break
        if abs(likelihood - before) < MIN_GAIN:
            break
    return weights, t


def _likelihood(sources: Tensor, labels: Tensor, weights: Tensor, t: Tensor) -> tuple[Tensor, float]:
    """Returns q [N, C], and the mean log-likelihood of the given labels, with the prior."""
    blind = torch.tensordot(weights, sources, 1).softmax(1)
    likelihood = (blind * t.T[labels]).sum(1).clamp(min=1e-30).log().mean()
    penalty = ((weights - PRIOR_WEIGHT) / PRIOR_DEVIATION).square().sum() / (2 * len(labels))
    return blind, float(likelihood - penalty)


def _newton_step(sources: Tensor, weights: Tensor, blind: Tensor, posterior: Tensor) -> Tensor:
    """Returns the Newton step [S] of the weights for fixed posteriors."""
    centred = sources - (sources * blind).sum(2, keepdim=True)
    gradient = torch.einsum("snc,nc->s", sources, posterior - blind) - (weights - PRIOR_WEIGHT) / PRIOR_DEVIATION**2
    curvature = torch.einsum("snc,tnc,nc->st", centred, centred, blind)
    ridge = RIDGE * curvature.diagonal().mean() + PRIOR_DEVIATION**-2
    return torch.linalg.solve(
        curvature + ridge * torch.eye(len(curvature), dtype=curvature.dtype, device="cpu"), gradient
    )


def posterior_of(blind: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Returns P(k | i, y_i) [N, C] from q [N, C], T and the given labels."""
    joint = t.T[labels].mul_(blind)
    return joint.div_(joint.sum(1, keepdim=True).clamp(min=1e-30))


def without_own_label(estimate: NeighbourEstimate, labels: Tensor) -> Tensor:
    """Returns the log probabilities [N, C] of the classes by the neighbours alone: the posterior divided by T_k,y."""
    log_posterior = estimate.posterior.clamp(min=1e-30).log_()
    return log_posterior.sub_(estimate.transition.log().T[labels]).log_softmax(1)
