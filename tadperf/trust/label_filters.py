"""The filters of confident learning (Northcutt, Jiang and Chuang, 2021), by the names that cleanlab gives them.

They return masks [N] of label errors. All take labels int64 [N] and probabilities [N, C].
"""

from __future__ import annotations

import torch
from torch import Tensor

FILTERS = (
    "prune_by_noise_rate",
    "prune_by_class",
    "both",
    "confident_learning",
    "predicted_neq_given",
    "low_normalized_margin",
    "low_self_confidence",
)
COUNTED = FILTERS[:3]  # these remove a number of samples that the joint counts give


def confident_filter(
    name: str, labels: Tensor, p: Tensor, joint: Tensor | None, remove: Tensor | None, share: float
) -> Tensor:
    """Returns the errors [N] that one of FILTERS finds; a label that is the likeliest class is never one.

    For the filters in COUNTED, joint: counts [C, C] (given, true), or None to estimate them. remove: the number of
    errors in each class [C], or None. share: multiplies all counts.
    """
    own = p.gather(1, labels.unsqueeze(1)).squeeze(1)
    differs = own < p.amax(1)
    if name == "predicted_neq_given":
        return differs
    if name not in COUNTED:
        confident = _confident_class(labels, p)
        errors = (confident != labels) & (confident >= 0) & differs
        if name == "confident_learning":
            return errors
        quality = own if name == "low_self_confidence" else own - p.scatter(1, labels.unsqueeze(1), -1.0).amax(1)
        return torch.zeros_like(errors).index_fill_(0, quality.argsort(stable=True)[: int(errors.sum())], True)
    joint = calibrate_joint(confident_joint(labels, p) if joint is None else joint, labels)
    counts = share * _off_diagonal(joint) if remove is None else share * _split_counts(joint, remove)
    mask = torch.ones_like(differs)
    if name != "prune_by_noise_rate":
        mask &= _lowest_by_class(own, labels, counts.sum(1).round().long())
    if name != "prune_by_class":
        mask &= _largest_margins(labels, p, own, _round_rows(counts))
    return mask & differs


def confident_joint(labels: Tensor, p: Tensor) -> Tensor:
    """Counts given and confident classes, [C, C]. A class is confident above its mean probability among its labels."""
    joint = torch.zeros(p.shape[1], p.shape[1], dtype=torch.float64)
    confident = _confident_class(labels, p)
    counted = confident >= 0
    joint.index_put_((labels[counted], confident[counted]), joint.new_ones(()), accumulate=True)
    joint.diagonal().clamp_(min=1)
    return joint


def calibrate_joint(joint: Tensor, labels: Tensor) -> Tensor:
    """Scales each row of joint [C, C] to the number of samples with that label."""
    joint = joint.double()
    count = labels.bincount(minlength=len(joint)).double()
    return joint / joint.sum(1, keepdim=True).clamp(min=1e-12) * count.unsqueeze(1)


def class_thresholds(labels: Tensor, p: Tensor) -> Tensor:
    """Returns the mean probability of each class among the samples with that label, [C]; 2 for a class without any."""
    count = labels.bincount(minlength=p.shape[1])
    own = p.gather(1, labels.unsqueeze(1)).squeeze(1).double()
    return torch.where(count > 0, labels.bincount(own, minlength=p.shape[1]) / count.clamp(min=1), 2.0)


def _confident_class(labels: Tensor, p: Tensor) -> Tensor:
    """Returns the likeliest class [N] among those above their threshold, -1 if there is none."""
    confident = torch.where(p >= class_thresholds(labels, p) - 1e-6, p, -1.0)
    best = confident.max(1)
    return torch.where(best.values >= 0, best.indices, -1)


def _off_diagonal(joint: Tensor) -> Tensor:
    return joint - joint.diagonal().diag()


def _split_counts(joint: Tensor, remove: Tensor) -> Tensor:
    """Splits each class's number of errors over the true classes in proportion to the joint; evenly if that is 0."""
    wrong = _off_diagonal(joint)
    even = _off_diagonal(torch.ones_like(joint))
    wrong = torch.where(wrong.sum(1, keepdim=True) > 0, wrong, even)
    return wrong / wrong.sum(1, keepdim=True) * remove.double().unsqueeze(1)


def _round_rows(counts: Tensor) -> Tensor:
    """Rounds to integers that keep the rounded sum of each row; the largest remainders are rounded up."""
    lower = counts.floor()
    missing = (counts.sum(1).round() - lower.sum(1)).long()
    rank = (counts - lower).argsort(dim=1, descending=True, stable=True).argsort(1)
    return (lower + (rank < missing.unsqueeze(1))).long()


def _lowest_by_class(own: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Marks the counts[k] samples of label k with the lowest probability of their label."""
    order = own.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    size = labels.bincount(minlength=len(counts))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - (size.cumsum(0) - size)[labels[order]]
    return rank < counts[labels]


def _largest_margins(labels: Tensor, p: Tensor, own: Tensor, counts: Tensor) -> Tensor:
    """Marks for each label k and class j the counts[k, j] samples of label k with the largest p_j - p_k."""
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for given in counts.sum(1).nonzero().squeeze(1).tolist():
        rows = (labels == given).nonzero().squeeze(1)
        for true in counts[given].nonzero().squeeze(1).tolist():
            margin = p[rows, true] - own[rows]
            mask[rows[margin.argsort(descending=True, stable=True)[: int(counts[given, true])]]] = True
    return mask
