"""The outer loop's division: which given labels the losses speak for.

In each class the losses follow a mixture of two Gaussians, of right labels (lower mean) and of wrong ones; the paper
has a class-wise dynamic mixture with a class-wise dynamic threshold (TAD, arXiv 2502.05027, abstract). The guards and
the threshold's rule are ours:

- a class is split only where two Gaussians beat one by BIC, stand apart by Ashman's D > 2, and the upper one's mean
  loss exceeds log 2: below, the label is still more likely than all others together, and the class is merely hard;
- a class that is not split, or has few samples, takes the split of all classes together; where that is none either,
  the losses show no errors and all labels are trusted;
- the threshold of a class is the lowest posterior, 0.5 or more, at which the expected share of wrong labels among the
  samples above it stays within a budget.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tadperf.kernels import Mixture, mixture

FEW = 20  # samples; below, five parameters are not worth fitting
APART = 2.0  # Ashman's D (Ashman, Bird and Zepf, 1994): above 2 the two modes are clearly apart


class Partition(NamedTuple):
    """posterior [N] that the given label is right, threshold [C], trusted bool [N], separated bool [C]."""

    posterior: Tensor
    threshold: Tensor
    trusted: Tensor
    separated: Tensor


def partition(
    losses: Tensor,
    labels: Tensor,
    num_classes: int | None = None,
    *,
    class_wise: bool = True,
    dynamic_threshold: bool = True,
    budget: float = 0.05,
    least: float = math.log(2),
) -> Partition:
    """Splits samples into trusted and untrusted by their losses (TAD's outer loop; see this module's first lines).

    losses: float [N], of any model, in nats, lower where it agrees with the label; +inf counts as surely wrong.
    labels: int [N], the given ones, in 0..C-1. class_wise: one mixture a class; else one for all. dynamic_threshold: by
    class and budget; else 0.5. budget: expected share of wrong labels that a class's trusted samples may have. least:
    mean loss that an upper mode of wrong labels has at least. Raises ValueError for shapes that do not fit, labels out
    of range, NaN or -inf among the losses.
    """
    losses, labels, classes = _check(losses, labels, num_classes)
    if not 0 <= budget < 1:
        raise ValueError(f"budget: {budget}: expected a share in [0, 1)")
    if class_wise:
        posterior, separated = _split_classes(losses, labels, classes, least)
    else:
        posterior, separated = _split_together(losses, labels, classes, least)
    threshold = torch.full((classes,), 0.5)
    if dynamic_threshold:
        groups = labels if class_wise else torch.zeros_like(labels)
        threshold = _threshold(posterior, groups, classes if class_wise else 1, budget).expand(classes).clone()
    return Partition(posterior, threshold, posterior >= threshold[labels], separated)


def _split_classes(losses: Tensor, labels: Tensor, classes: int, least: float) -> tuple[Tensor, Tensor]:
    """Posterior [N] and whether it is of a real split [C]: of each class alone, or of all where that shows none."""
    large = labels.bincount(minlength=classes) >= FEW
    own, apart = _split(losses, labels if large.all() else torch.where(large[labels], labels, -1), classes, least)
    if apart.all():
        return own, apart
    posterior, separated = _split_together(losses, labels, classes, least)
    return torch.where(apart[labels], own, posterior), apart | (~large & separated)


def _split_together(losses: Tensor, labels: Tensor, classes: int, least: float) -> tuple[Tensor, Tensor]:
    posterior, apart = _split(losses, torch.zeros_like(labels), 1, least)
    return torch.where(apart | losses.isinf(), posterior, 1.0), apart.expand(classes)


def _check(losses: Tensor, labels: Tensor, num_classes: int | None) -> tuple[Tensor, Tensor, int]:
    if not losses.is_floating_point() or losses.ndim != 1 or len(losses) == 0:
        raise ValueError(f"losses: {losses.dtype} {tuple(losses.shape)}: expected floats [N], N of 1 or more")
    if labels.dtype not in (torch.int32, torch.int64) or labels.shape != losses.shape:
        raise ValueError(f"labels: {labels.dtype} {tuple(labels.shape)}: expected int32 or int64 {tuple(losses.shape)}")
    bad = losses.isnan() | (losses == -torch.inf)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"losses: {float(losses[first])} at sample {first}, and {int(bad.sum())} such in all: expected numbers; "
            "the model that gave them has diverged"
        )
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(f"labels: {int(labels[first])} at sample {first}: expected 0 to {classes - 1}")
    return losses.detach(), labels.long(), classes


def _split(losses: Tensor, groups: Tensor, count: int, least: float) -> tuple[Tensor, Tensor]:
    """Posterior of the low mode [N], and the groups whose second mode is one of wrong labels, bool [count]."""
    fit = mixture(losses, groups, count, monotone=True)
    return fit.posterior.float(), _apart(fit, losses, groups) & (fit.mean[:, 1] > least)


def _apart(fit: Mixture, losses: Tensor, groups: Tensor) -> Tensor:
    """Groups whose two modes are real: BIC prefers them to one Gaussian (3 parameters more), and Ashman's D > 2."""
    count = len(fit.weight)
    used = (groups >= 0) & losses.isfinite()
    x, g = (losses, groups) if used.all() else (losses[used], groups[used])
    x = x.double()
    n = g.bincount(minlength=count).double()
    mean = g.bincount(x, count) / n
    variance = g.bincount((x - mean[g]) ** 2, count) / n
    one = -0.5 * n * ((2 * math.pi * variance).log() + 1)
    gain = 2 * (fit.log_likelihood - one) - 3 * n.log()
    distance = (fit.mean[:, 1] - fit.mean[:, 0]) / (fit.variance.sum(1) / 2).sqrt()
    return (gain > 0) & (distance > APART)  # NaN (no losses, or all equal) compares False


def _threshold(posterior: Tensor, groups: Tensor, count: int, budget: float) -> Tensor:
    """Lowest threshold >= 0.5 of each group at which mean(1 - posterior) above it is within the budget, [count].

    A group keeps the best tenth of its posteriors >= 0.5 whatever the budget, so that every class has an anchor.
    """
    # By group, then from the highest posterior. NumPy's sort has AVX2 and AVX-512: 0.25 ms for 50 000 keys, and 3 with
    # PyTorch's; the keys hold all there is to know.
    keys = groups + (1 - posterior.double()) / 2
    keys = torch.from_numpy(np.sort(keys.numpy())) if keys.device.type == "cpu" else keys.sort().values
    g = keys.long()
    p = (1 - 2 * (keys - g)).to(posterior.dtype).double()
    start = g.bincount(minlength=count).cumsum(0) - g.bincount(minlength=count)
    rank = torch.arange(1, len(g) + 1, device=g.device) - start[g]
    wrong = (1 - p).cumsum(0)
    before = torch.cat([wrong.new_zeros(1), wrong])[start.clamp(max=len(g))]
    low = p >= 0.5
    tenth = (torch.zeros_like(start).index_add_(0, g, low.long()) + 9) // 10
    # the posteriors descend, so that the expected share of wrong labels grows along a group
    inside = low & (((wrong - before[g]) / rank <= budget) | (rank <= tenth[g]))
    threshold = torch.ones(count, dtype=torch.float64, device=g.device)
    threshold.scatter_reduce_(0, g[inside], p[inside], "amin")
    return threshold.clamp(min=0.5).float()
