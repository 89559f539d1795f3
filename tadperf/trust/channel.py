"""How likely every label is wrong: a noise channel fitted to a model's probabilities.

Sample i has the probabilities p_i over the given labels, from a model that has not seen its label. We model its given
label y_i as a true class k that passed through a transition matrix T [true, given] (tadperf):

    P(k | i) ~ p_ik^b exp(h sum_j sqrt(p_ij T_kj))        P(y_i | i) = sum_k P(k | i) T_k,y_i

The exponent compares p_i with row k of T (Bhattacharyya's affinity): it is bounded, so exact zeros in p do no harm. A
model trained on labels with 45 % of class c renamed to c + 1 gives p_i = (0.55, 0.45, 0) for the samples of c. That
fits row c, and the second label is wrong for certain, although no probability says so. T comes from EM. The given
labels choose b and h by likelihood; each sample's own label is not in its p_i.

This holds for noise that depends on the class. Human errors depend on the sample: then p_i already predicts which
label is given, and the likelihood would choose classes as vague as p_i. So we mix two channels: the likeliest one, and
the most certain one (CERTAIN), in which the likeliest class of a sample is nearly always the true one. The likeliest
has more weight if a channel with sharp classes (SHARP) explains the labels better than p_i with its best temperature.
The constants were chosen on 62 cases; bench/results/audit-rule.md has the figures and a known weakness: few wrong
labels (2 %) and a weak model look like human errors.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tadperf import seeds

POWERS = (0.0, 1.0, 2.0, 4.0)  # candidates for b
AFFINITIES = (0.0, 6.0, 12.0, 24.0, 48.0)  # candidates for h
SHARP = (0.0, 24.0)
CERTAIN = (16.0, 48.0)
GAINS = (0.02, 0.05)  # gain of SHARP, as a share of what p_i tells about the labels, for weight 0 and for weight 1
TEMPERATURES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)  # exponents of p_i
SMOOTHING = 1e-3  # share of p_i that is uniform; not tuned
PRIOR = 20.0  # pseudo-labels that pull each row of T towards a symmetric matrix; not tuned
FLOOR = 1e-3  # share of each row of T that is uniform, so that no label is impossible; not tuned
ROUNDS = 8  # how often T and the classes are estimated in turn
SELECTION_SIZE = 2**17  # samples x classes used to choose b and h, or two samples per class if that is more


class Channel(NamedTuple):
    """odds [N]: log odds that the label is wrong. transition [C, C] (true, given). by_class: the noise is by class."""

    odds: Tensor
    transition: Tensor
    by_class: float


class FittedChannel(NamedTuple):
    """parts: weight, transition [C, C], b and h of one or two channels. present: bool [C], which classes are labels."""

    parts: tuple[tuple[float, Tensor, float, float], ...]
    by_class: float
    present: Tensor


def noise_channel(probabilities: Tensor, labels: Tensor) -> Channel:
    """Fits the noise channel (top of this module). probabilities: float [N, C], rows sum to 1. labels: int64 [N].

    A class that no sample has as its label cannot be a true class.
    """
    fitted = fit_channel(probabilities, labels)
    transition = sum((part[0] * part[1] for part in fitted.parts), torch.zeros(()))
    return Channel(channel_odds(fitted, probabilities, labels), transition, fitted.by_class)


def fit_channel(probabilities: Tensor, labels: Tensor) -> FittedChannel:
    """Chooses both channels and estimates their transitions. Takes the arguments of `noise_channel`."""
    count, classes = probabilities.shape
    present = labels.bincount(minlength=classes) > 0
    probabilities = _of_present_classes(probabilities, present)
    size = max(SELECTION_SIZE // classes, 2 * classes)
    rows = torch.arange(count)
    if count > size:
        rows = torch.randperm(count, generator=seeds.generator(0, "channel"))[:size]
    fits = {
        sharpness: _fit(probabilities[rows], labels[rows], *sharpness)[1]
        for sharpness in itertools.product(POWERS, AFFINITIES)
        if sum(sharpness) > 0
    }
    alone = _likelihood_alone(probabilities[rows], labels[rows])
    share = labels[rows].bincount(minlength=classes) / len(rows)
    information = max(alone + float(torch.special.entr(share).sum()), 1e-9)
    low, high = GAINS
    by_class = min(max(((fits[SHARP] - alone) / information - low) / (high - low), 0.0), 1.0)
    best = max(fits, key=fits.__getitem__)
    parts = [
        (weight, _fit(probabilities, labels, *sharpness)[0], *sharpness)
        for weight, sharpness in ((by_class, best), (1 - by_class, CERTAIN))
        if weight > 0
    ]
    return FittedChannel(tuple(parts), by_class, present)


def channel_odds(fitted: FittedChannel, probabilities: Tensor, labels: Tensor) -> Tensor:
    """Returns the log odds [N] that each label is wrong. The samples may be others than those of the fit."""
    p = _of_present_classes(probabilities, fitted.present)
    odds = [(math.log(weight), _log_odds(p, labels, *channel)) for weight, *channel in fitted.parts]
    wrong = torch.stack([w + logsigmoid(o) for w, o in odds]).logsumexp(0)
    right = torch.stack([w + logsigmoid(-o) for w, o in odds]).logsumexp(0)
    return wrong - right


def _of_present_classes(probabilities: Tensor, present: Tensor) -> Tensor:
    if present.all():
        return probabilities
    probabilities = torch.where(present, probabilities.clamp(min=1e-6), 0.0)
    return probabilities / probabilities.sum(1, keepdim=True)


def most_suspicious(odds: Tensor) -> Tensor:
    """Returns the indices of the k largest odds, descending; k maximises the expected F1 of finding wrong labels.

    With the probabilities q of a wrong label in descending order, the expected F1 of the first k is about
    2 sum_{i<=k} q_i / (k + sum_i q_i). Returns none if less than half a label is expected to be wrong.
    """
    order = odds.argsort(descending=True, stable=True)
    wrong = odds[order].double().sigmoid()
    found, total = wrong.cumsum(0), float(wrong.sum())
    if total < 0.5:
        return order[:0]
    return order[: int((found / (torch.arange(1, len(odds) + 1) + total)).argmax()) + 1]


def _smooth(p: Tensor) -> Tensor:
    return (1 - SMOOTHING) * p + SMOOTHING / p.shape[1]


def _log_odds(p: Tensor, labels: Tensor, transition: Tensor, power: float, affinity: float) -> Tensor:
    """Returns the log odds [N] that the true class is not the given label."""
    p, column = _smooth(p), labels.unsqueeze(1)
    joint = power * p.log() + affinity * (p.sqrt() @ transition.sqrt().T) + transition.log().T[labels]
    own = joint.gather(1, column).squeeze(1)
    return joint.scatter(1, column, -math.inf).logsumexp(1) - own


def _fit(p: Tensor, labels: Tensor, power: float, affinity: float) -> tuple[Tensor, float]:
    """Estimates T by EM. Returns T and the mean log-likelihood of the given labels."""
    smooth = _smooth(p)
    base, roots = power * smooth.log(), smooth.sqrt()
    classes = (4 * smooth.log()).softmax(1)  # nearly the likeliest class
    num = p.shape[1]
    transition = torch.full((num, num), 0.2 / (num - 1)).fill_diagonal_(0.8)
    for _ in range(ROUNDS):
        for _ in range(2):
            transition = _estimate_transition(classes * transition.T[labels], labels)
        classes = (base + affinity * (roots @ transition.sqrt().T)).softmax(1)
    likelihood = (classes * transition.T[labels]).sum(1).clamp(min=1e-30).log().mean()
    return transition, float(likelihood)


def _estimate_transition(joint: Tensor, labels: Tensor) -> Tensor:
    """Returns T from P(k, y_i | i) [N, C], with the prior. The diagonal is raised to the largest entry of its row."""
    num = joint.shape[1]
    posterior = joint / joint.sum(1, keepdim=True).clamp(min=1e-30)
    counts = torch.zeros(num, num).index_add_(0, labels, posterior).T
    right = float((counts.trace() / counts.sum()).clamp(1 / num, 1))
    t = counts + PRIOR * torch.full_like(counts, (1 - right) / (num - 1)).fill_diagonal_(right)
    t = t / t.sum(1, keepdim=True)
    t.diagonal().copy_(t.amax(1))
    return (1 - FLOOR) * t / t.sum(1, keepdim=True) + FLOOR / num


def _likelihood_alone(p: Tensor, labels: Tensor) -> float:
    """Returns the mean log-likelihood of the given labels under p with its best temperature."""
    log_p, column = _smooth(p).log(), labels.unsqueeze(1)
    return max(float((beta * log_p).log_softmax(1).gather(1, column).mean()) for beta in TEMPERATURES)
