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
has more weight if a channel with sharp classes (SHARP) explains the labels better than replaced labels do (below).

The most certain channel takes every doubt of the model for an error. A weak model and a few wrong labels need another
one: the channel of `tadperf.trust.replacement`. The more of the doubt it explains (EXPLAINED), the more weight it gets,
and the fewer labels are returned: from the number of the first two channels to that of the confident joint, and on to
that of the replacements. We shift all log odds by a constant until `most_suspicious` returns this number.
The constants were chosen on 254 cases; bench/results/audit-rule.md has the figures and the known weaknesses.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tadperf import seeds
from tadperf.trust.label_filters import calibrate_joint, confident_joint
from tadperf.trust.replacement import Replacement, fit_replacement, replacement_odds

SHARP = (0.0, 24.0)  # b and h
CANDIDATES = ((0.0, 12.0), SHARP, (0.0, 48.0), (2.0, 0.0), (2.0, 6.0))  # for the likeliest channel
CERTAIN = (16.0, 48.0)
GAINS = (0.0, 0.03)  # gain of SHARP, as a share of what p_i tells about the labels, for weight 0 and for weight 1
EXPLAINED = (0.2, 0.28, 0.36)  # share of the doubt that replacements explain, for none, half and all of their weight
SMOOTHING = 1e-3  # share of p_i that is uniform; not tuned
PRIOR = 20.0  # pseudo-labels that pull each row of T towards a symmetric matrix; not tuned
FLOOR = 1e-3  # share of each row of T that is uniform, so that no label is impossible; not tuned
ROUNDS = 8  # how often T and the classes are estimated in turn
REFINEMENTS = 2  # the same on all samples, from the T of a part
SELECTION_SIZE = 2**16  # samples x classes on which the channels are chosen, or two samples per class if that is more
MAX_SHIFT, SHIFT_STEPS = 30.0, 40  # range of the shift of the log odds, and steps of the bisection


class Channel(NamedTuple):
    """odds [N]: log odds that the label is wrong. transition [C, C] (true, given). by_class: the noise is by class."""

    odds: Tensor
    transition: Tensor
    by_class: float


class FittedChannel(NamedTuple):
    """parts: weight, transition [C, C], b and h of one or two channels. present: bool [C], which classes are labels.

    replaced_weight: weight of the replacements' log odds beside those of the parts. shift: is added to the log odds.
    """

    parts: tuple[tuple[float, Tensor, float, float], ...]
    by_class: float
    present: Tensor
    replacement: Replacement
    replaced_weight: float = 0.0
    shift: float = 0.0


def noise_channel(probabilities: Tensor, labels: Tensor) -> Channel:
    """Fits the noise channel (top of this module). probabilities: float [N, C], rows sum to 1. labels: int64 [N].

    A class that no sample has as its label cannot be a true class.
    """
    fitted = fit_channel(probabilities, labels)
    transition = sum((part[0] * part[1] for part in fitted.parts), torch.zeros(()))
    return Channel(channel_odds(fitted, probabilities, labels), transition, fitted.by_class)


def fit_channel(probabilities: Tensor, labels: Tensor) -> FittedChannel:
    """Chooses the channels, their weights and the shift. Takes the arguments of `noise_channel`."""
    count, classes = probabilities.shape
    present = labels.bincount(minlength=classes) > 0
    probabilities = _of_present_classes(probabilities, present)
    size = max(SELECTION_SIZE // classes, 2 * classes)
    p, given = probabilities, labels
    if count > size:
        rows = torch.randperm(count, generator=seeds.generator(0, "channel"))[:size]
        p, given = probabilities[rows], labels[rows]
    replacement = fit_replacement(_smooth(p).log(), given)
    share = given.bincount(minlength=classes) / len(given)
    information = max(replacement.alone + float(torch.special.entr(share).sum()), 1e-9)
    fits = {SHARP: _fit(p, given, *SHARP)}
    better = fits[SHARP][1] - max(replacement.alone, replacement.replaced)
    by_class = _ramp(better / information, *GAINS)
    if by_class > 0:
        fits |= {sharpness: _fit(p, given, *sharpness) for sharpness in CANDIDATES if sharpness != SHARP}
    best = max(fits, key=lambda sharpness: fits[sharpness][1])
    if by_class < 1:
        fits[CERTAIN] = _fit(p, given, *CERTAIN)
    parts = []
    for weight, sharpness in ((by_class, best), (1 - by_class, CERTAIN)):
        if weight > 0:
            transition = fits[sharpness][0]
            if count > size:
                transition, _ = _fit(probabilities, labels, *sharpness, transition, REFINEMENTS)
            parts.append((weight, transition, *sharpness))
    fitted = FittedChannel(tuple(parts), by_class, present, replacement)
    low, middle, high = EXPLAINED
    explained = _ramp(replacement.explained, low, middle) + _ramp(replacement.explained, middle, high)
    return _add_replacement(fitted, explained / 2 * (1 - by_class), p, given)


def _add_replacement(fitted: FittedChannel, weight: float, p: Tensor, labels: Tensor) -> FittedChannel:
    """Sets the weight of the replacements and the shift of the log odds (top of this module)."""
    if weight == 0:
        return fitted
    most = max(len(most_suspicious(channel_odds(fitted, p, labels))), 0.5)
    odds = replacement_odds(fitted.replacement, _smooth(p).log(), labels)
    fewest = min(max(len(most_suspicious(odds)), 0.5), most)
    joint = calibrate_joint(confident_joint(labels, p), labels)
    middle = min(max(float(joint.sum() - joint.trace()), fewest), most)
    start, end, way = (most, middle, 2 * weight) if weight <= 0.5 else (middle, fewest, 2 * weight - 1)
    number = round(start ** (1 - way) * end**way)  # on a logarithmic scale
    fitted = fitted._replace(replaced_weight=weight)
    odds = channel_odds(fitted, p, labels)
    low, high = -MAX_SHIFT, MAX_SHIFT
    for _ in range(SHIFT_STEPS):
        shift = (low + high) / 2
        low, high = (shift, high) if len(most_suspicious(odds + shift)) < number else (low, shift)
    return fitted._replace(shift=high)


def _ramp(value: float, low: float, high: float) -> float:
    """Returns 0 below `low`, 1 above `high`, linear between."""
    return min(max((value - low) / (high - low), 0.0), 1.0)


def channel_odds(fitted: FittedChannel, probabilities: Tensor, labels: Tensor) -> Tensor:
    """Returns the log odds [N] that each label is wrong. The samples may be others than those of the fit."""
    p = _of_present_classes(probabilities, fitted.present)
    parts = [
        (math.log(weight), _log_odds(p, labels, t, power, affinity)) for weight, t, power, affinity in fitted.parts
    ]
    wrong = torch.stack([w + logsigmoid(o) for w, o in parts]).logsumexp(0)
    right = torch.stack([w + logsigmoid(-o) for w, o in parts]).logsumexp(0)
    odds = wrong - right
    if fitted.replaced_weight:
        replaced = replacement_odds(fitted.replacement, _smooth(p).log(), labels)
        odds = (1 - fitted.replaced_weight) * odds + fitted.replaced_weight * replaced
    return odds + fitted.shift


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


def _fit(
    p: Tensor,
    labels: Tensor,
    power: float,
    affinity: float,
    transition: Tensor | None = None,
    rounds: int = ROUNDS,
) -> tuple[Tensor, float]:
    """Estimates T by EM, from `transition` if it is given. Returns T and the mean log-likelihood of the labels."""
    smooth = _smooth(p)
    base, roots = power * smooth.log(), smooth.sqrt()
    num = p.shape[1]
    if transition is None:
        classes = (4 * smooth.log()).softmax(1)  # nearly the likeliest class
        transition = torch.full((num, num), 0.2 / (num - 1)).fill_diagonal_(0.8)
    else:
        classes = (base + affinity * (roots @ transition.sqrt().T)).softmax(1)
    for _ in range(rounds):
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
