"""Labels that were replaced: a noise channel with one parameter for each class, and no matrix.

With probability s_j the label of a sample was replaced by j, whatever its true class is (tadperf):

    P(y_i) = (1 - sum_j s_j) q_i,y + s_y        q_i ~ p_i^b        P(wrong) = s_y (1 - q_i,y) / P(y_i)

Uniform errors have equal s_j; a class that attracts wrong labels has a large one. s comes from EM, b by likelihood.

Without replacements the best b is lower, because a few labels that p_i excludes flatten q. So we compare the doubt of
both, the mean of 1 - max_j q_ij. `explained` is the share of the doubt that replacements take away. If it is large, the
labels that p_i excludes are errors, and the remaining doubts are those of a weak model. If it is 0, p_i predicts the
given labels as well as it claims. This is so for human errors, and for a weak model without errors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EXPONENTS = torch.arange(-2.5, 2.6, 0.5).double()  # candidates for log2 b
FINE = torch.arange(-0.5, 0.51, 0.125).double()  # candidates around the best of them; the best of these is interpolated
PRIOR = 20.0  # pseudo-labels that pull s towards equal values; not tuned
SEARCH_STEPS, FINAL_STEPS = 40, 200  # steps of EM for each candidate, and for the best; not tuned
MIN_DRAW = 1e-6


class Replacement(NamedTuple):
    """b (power), s [C] (draws), the mean log-likelihoods of the labels without and with replacements, `explained`."""

    power: float
    draws: Tensor
    alone: float
    replaced: float
    explained: float


def fit_replacement(log_p: Tensor, labels: Tensor) -> Replacement:
    """Fits the channel at the top of this file. log_p: float [N, C], finite. labels: int64 [N]."""
    classes = log_p.shape[1]

    def own(exponents: Tensor) -> Tensor:
        return torch.stack([_own(log_p, labels, 2**e) for e in exponents.tolist()])

    def replaced(q: Tensor) -> Tensor:
        return _likelihood(q, _draws(q, labels, classes, SEARCH_STEPS), labels).log().mean(1)

    coarse = own(EXPONENTS)
    values = {"alone": coarse.log().mean(1), "replaced": replaced(coarse)}
    best = {}
    for name, score in (("alone", lambda q: q.log().mean(1)), ("replaced", replaced)):
        near = EXPONENTS[values[name].argmax()] + FINE
        best[name] = 2 ** _peak(near, score(own(near)))
    power = best["replaced"]
    q = _own(log_p, labels, power).unsqueeze(0)
    draws = _draws(q, labels, classes, FINAL_STEPS)
    likelihood = float(_likelihood(q, draws, labels).log().mean())
    explained = 1 - _doubt(log_p, power) / max(_doubt(log_p, best["alone"]), 1e-12)
    return Replacement(power, draws[0], float(values["alone"].max()), likelihood, explained)


def replacement_odds(fitted: Replacement, log_p: Tensor, labels: Tensor) -> Tensor:
    """Returns the log odds [N] that each label is wrong."""
    own = _own(log_p, labels, fitted.power)
    draws = fitted.draws.clamp(min=MIN_DRAW)
    ratio = draws.log() - (1 - draws.sum() + draws).log()
    return (ratio[labels] + (1 - own).clamp(min=1e-9).log() - own.log()).float()


def _own(log_p: Tensor, labels: Tensor, power: float) -> Tensor:
    """Returns q_i,y, float64 [N]."""
    scaled = power * log_p
    return (scaled.gather(1, labels.unsqueeze(1)).squeeze(1) - scaled.logsumexp(1)).double().exp().clamp(1e-30, 1)


def _doubt(log_p: Tensor, power: float) -> float:
    """Returns the mean of 1 - max_j q_ij."""
    scaled = power * log_p
    return float(1 - (scaled.amax(1) - scaled.logsumexp(1)).exp().double().mean())


def _likelihood(own: Tensor, draws: Tensor, labels: Tensor) -> Tensor:
    """Returns P(y_i) for each candidate, [candidates, N]. own: [candidates, N]. draws: [candidates, C]."""
    return own * (1 - draws.sum(1, keepdim=True)) + draws[:, labels]


def _draws(own: Tensor, labels: Tensor, classes: int, steps: int) -> Tensor:
    """Returns s for each candidate, [candidates, C], by EM. own: [candidates, N]."""
    count = len(labels)
    draws = own.new_full((len(own), classes), 0.05 / classes)
    for _ in range(steps):
        drawn = draws[:, labels] / _likelihood(own, draws, labels)
        counts = torch.zeros_like(draws).index_add_(1, labels, drawn)
        rate = counts.sum(1, keepdim=True) / count
        draws = (counts + PRIOR * rate / classes) / (count + PRIOR * rate)
    return draws


def _peak(places: Tensor, values: Tensor) -> float:
    """Returns the place of the largest value, interpolated by a parabola. places: evenly spaced."""
    i = int(values.argmax())
    shift = 0.0
    if 0 < i < len(values) - 1:
        before, top, after = values[i - 1 : i + 2].tolist()
        bend = before - 2 * top + after
        shift = (before - after) / (2 * bend) if bend < 0 else 0.0
    return float(places[i]) + shift * float(places[1] - places[0])
