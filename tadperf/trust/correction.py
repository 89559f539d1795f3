"""Which class an audited sample shows, and whether that is sure enough to train with.

An audit has probabilities that have not seen the label. Their weight and a transition matrix are estimated from the
given labels as for the dual loop (`tadperf.trust.posterior`). A class is sure if its posterior passes the threshold of
the dual loop: the expected share of wrong labels, by class, stays within `trust.budget`. With the default of 5 %, on 15
public sets of CIFAR-10 (human and simulated errors, networks of others), 90 to 99.9 % of the new labels were right
(bench/results/real.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.trust.partition import budget_threshold
from tadperf.trust.posterior import MIN_LOG, pool_classes, posterior_of


class FittedPool(NamedTuple):
    """weight: of the log probabilities. transition: [C, C], true class to given label."""

    weight: float
    transition: Tensor


class Likeliest(NamedTuple):
    """candidate int64 [N]: the likeliest class, by the probabilities and the given label. probability [N] of it."""

    candidate: Tensor
    probability: Tensor


def fit_pool(probabilities: Tensor, labels: Tensor) -> FittedPool:
    """Estimates weight and transition. probabilities: float [N, C], out of fold. labels: int64 [N], as given."""
    pool = pool_classes([_logs(probabilities)], labels, 0)
    return FittedPool(pool.weights[0], pool.transition)


def likeliest_class(fitted: FittedPool, probabilities: Tensor, labels: Tensor) -> Likeliest:
    """Returns the class of each sample. The samples may be others than those of the fit."""
    blind = _logs(probabilities).mul_(fitted.weight).softmax(1)
    probability, candidate = posterior_of(blind, fitted.transition, labels).max(1)
    return Likeliest(candidate, probability)


def sure_classes(found: Likeliest, num_classes: int, budget: float) -> Tensor:
    """Returns which candidates are sure, bool [N]. budget: the expected share of errors in a class."""
    threshold = budget_threshold(found.probability, found.candidate, num_classes, budget)
    return found.probability >= threshold[found.candidate]


def _logs(probabilities: Tensor) -> Tensor:
    return probabilities.float().clamp(min=torch.finfo(torch.float32).tiny).log_().clamp_(min=MIN_LOG)
