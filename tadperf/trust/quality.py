"""The quality of every label: a score for each sample, low for labels that are probably wrong."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tadperf.data.convert import as_tensor
from tadperf.data.dataset import describe_tensor
from tadperf.trust.channel import noise_channel
from tadperf.trust.label_filters import class_thresholds
from tadperf.trust.probe import pool_features

ROW_SUM_TOLERANCE = 0.01  # bfloat16 rounds each probability by up to 0.2 %
METHODS = ("noise_channel", "self_confidence", "normalized_margin", "confidence_weighted_entropy")


def label_quality_scores(
    labels: ArrayLike | Tensor,
    pred_probs: ArrayLike | Tensor | None = None,
    features: ArrayLike | Tensor | None = None,
    *,
    method: str = "noise_channel",
    adjust_pred_probs: bool = False,
) -> Any:
    """Returns a score [N] in [0, 1] for every label, as a NumPy array; low scores are suspicious.

    labels, pred_probs, features: as for `find_label_issues`. method: "noise_channel" is tadperf's probability that the
    label is right (`noise_channel`). The other three are those of cleanlab.rank.get_label_quality_scores:
    "self_confidence" is the probability p of the label, "normalized_margin" is (p - largest other + 1) / 2,
    "confidence_weighted_entropy" is log(1 + w) / w for w = entropy / (log C p). adjust_pred_probs, for the first two of
    these only: subtracts the mean probability of each class before.
    Raises ValueError as `find_label_issues` does.
    """
    given, p = check_input(labels, pred_probs, features)
    return rank_score(method, given, p, adjust_pred_probs).numpy()


def rank_score(method: str, labels: Tensor, p: Tensor, adjust: bool = False) -> Tensor:
    """Returns one of the scores [N] of `label_quality_scores`."""
    if method not in METHODS:
        raise ValueError(f"method: {method!r}: must be one of {', '.join(METHODS)}")
    if adjust and method not in METHODS[1:3]:
        raise ValueError(f"adjust_pred_probs: True: works with {METHODS[1]} and {METHODS[2]} only, not with {method}")
    if method == "noise_channel":
        return (-noise_channel(p, labels).odds.double()).sigmoid()
    p = p.double()
    if adjust:
        threshold = class_thresholds(labels, p).clamp(max=1)
        p = p - threshold + threshold.max()
        p = p / p.sum(1, keepdim=True)
    own = p.gather(1, labels.unsqueeze(1)).squeeze(1)
    if method == "self_confidence":
        return own
    if method == "normalized_margin":
        return (own - p.scatter(1, labels.unsqueeze(1), -1.0).amax(1) + 1) / 2
    entropy = torch.special.entr(p).sum(1) / torch.tensor(float(p.shape[1])).log()
    weighted = entropy.clamp(min=1e-6) / own.clamp(min=1e-12)
    return weighted.log1p() / weighted


def check_input(
    labels: ArrayLike | Tensor, pred_probs: ArrayLike | Tensor | None, features: ArrayLike | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns labels int64 [N] and probabilities float32 [N, C], on the CPU, after the features were pooled in.

    Raises ValueError if an array is wrong or if both pred_probs and features are missing.
    """
    if pred_probs is None and features is None:
        raise ValueError("pred_probs: None: give pred_probs [N, C], features [N, D], or both")
    given = as_tensor("labels", labels).cpu()
    p = None if pred_probs is None else _check_probabilities(as_tensor("pred_probs", pred_probs).cpu())
    z = None if features is None else _check_features(as_tensor("features", features).cpu())
    count = len(p) if p is not None else len(z) if z is not None else 0
    if given.shape != (count,) or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"labels: {describe_tensor(given)}: must be integers [{count}]")
    given = given.long()
    classes = max(int(given.max()) + 1, 2) if p is None else p.shape[1]
    wrong = (given < 0) | (given >= classes)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"labels: {int(given[row])} at sample {row}: must be in 0..{classes - 1}")
    if z is None:
        assert p is not None
        return given, p
    if len(z) != count or count < 2:
        raise ValueError(f"features: {describe_tensor(z)}: must be floats [{count}, D], for 2 samples or more")
    return given, pool_features(z.float(), given, classes, p)


def _check_features(z: Tensor) -> Tensor:
    if z.ndim != 2 or not z.is_floating_point() or not z.shape[1] or not len(z):
        raise ValueError(f"features: {describe_tensor(z)}: must be floats [N, D]")
    _check_finite("features", z)
    return z


def _check_finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        row = int((~values.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{name}: NaN or infinite value at sample {row}: must be finite")


def _check_probabilities(p: Tensor) -> Tensor:
    """Returns float32 rows. Raises ValueError for logits, log probabilities and other rows that are no distribution."""
    if p.ndim != 2 or p.shape[1] < 2 or not p.is_floating_point() or not len(p):
        raise ValueError(f"pred_probs: {describe_tensor(p)}: must be floats [N, C] with N >= 1 and C >= 2")
    _check_finite("pred_probs", p)
    p = p.float()
    outside = (p < 0).any(1) | (p > 1).any(1)
    if outside.any():
        row = int(outside.nonzero()[0])
        worst = p[row][(p[row] < 0) | (p[row] > 1)][0]
        raise ValueError(f"pred_probs: {float(worst):g} at sample {row}: must be in [0, 1]; apply softmax to logits")
    sums = p.sum(1)
    wrong = (sums - 1).abs() > ROW_SUM_TOLERANCE
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"pred_probs: sum {float(sums[row]):g} at sample {row}: every row must sum to 1; normalise it")
    return p
