"""The outer partition: which given labels the losses support.

In each class the losses follow a mixture of two Gaussians: right labels (lower mean) and wrong labels. The paper has a
class-wise dynamic mixture with a class-wise dynamic threshold (TAD, arXiv 2502.05027, abstract). The checks and the
rule for the threshold are ours:

- Losses of a network in training have a peak at 0, and the lower Gaussian shrinks onto it. Then the variances need a
  floor (FLOOR), as in DivideMix. We use it for a class where it matters: the lower Gaussian is narrower than the floor,
  its weight is larger with the floor, and the class has two modes then.
- A class is split only if BIC prefers two Gaussians to one, Ashman's D is above 2, and the upper mean loss is above
  log 2. Below log 2 the label is still more likely than all other classes together: the class is only hard to learn.
- A class that is not split, or has few samples, uses the split of all classes together. If there is no such split
  either, the losses show no errors and all labels are trusted.
- The threshold of a class is the lowest posterior, at least 0.5, for which the expected share of wrong labels among
  the samples above it stays within a budget.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tadperf.data.convert import as_tensor
from tadperf.data.dataset import describe_tensor
from tadperf.kernels import Mixture, mixture

MIN_SAMPLES = 20  # a class with fewer samples is not fitted alone: a mixture has five parameters; not tuned
FLOOR = 0.01  # of the variances, as a share of the class's; DivideMix's is 0.015 to 0.02 on simulated logits
MIN_WEIGHT_GAIN = 0.05  # weight that the floor adds to a shrunken Gaussian; it adds 0.1 or more there, 0.00 on digits
MIN_ASHMAN_D = 2.0  # above 2 the two modes are clearly separated (Ashman, Bird and Zepf, 1994)
MIN_THRESHOLD = 0.5
KEEP_ONE_IN = 10  # a class keeps the best tenth of its posteriors >= 0.5, even above the budget; not tuned


class Partition(NamedTuple):
    """posterior [N] of a right label, threshold [C], trusted bool [N], separated bool [C]: which classes were split."""

    posterior: Tensor
    threshold: Tensor
    trusted: Tensor
    separated: Tensor


def partition(
    losses: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    num_classes: int | None = None,
    *,
    class_wise: bool = True,
    dynamic_threshold: bool = True,
    budget: float = 0.05,
    min_wrong_loss: float = math.log(2),
) -> Partition:
    """Splits samples into trusted and untrusted by their losses (TAD's outer loop; see the top of this module).

    losses: float [N] in nats, low if the model agrees with the label; +inf means surely wrong. They suit a network in
    training. For held-out probabilities `find_label_issues` is better: mean F1 0.94 against 0.32 in 15 cases of digits.
    labels: integers [N] in 0..C-1, as given. Both may be tensors or NumPy arrays. Returns tensors.
    class_wise: fits one mixture per class instead of one for all. dynamic_threshold: computes a threshold per class
    from the budget instead of 0.5. budget: expected share of wrong labels among the trusted samples of a class; not
    tuned.
    min_wrong_loss: lowest mean loss that the mode of wrong labels may have.
    Raises ValueError if shapes differ, a label is out of range, or a loss is NaN or -inf.
    """
    losses, labels, classes = _check(as_tensor("losses", losses), as_tensor("labels", labels), num_classes)
    if not 0 <= budget < 1:
        raise ValueError(f"budget: {budget}: must be a share in [0, 1)")
    split = _split_classes if class_wise else _split_together
    posterior, separated = split(losses, labels, classes, min_wrong_loss)
    threshold = torch.full((classes,), MIN_THRESHOLD, device=losses.device)
    if dynamic_threshold:
        groups = labels if class_wise else torch.zeros_like(labels)
        threshold = budget_threshold(posterior, groups, classes if class_wise else 1, budget).expand(classes).clone()
    return Partition(posterior, threshold, posterior >= threshold[labels], separated)


def _split_classes(losses: Tensor, labels: Tensor, classes: int, min_wrong_loss: float) -> tuple[Tensor, Tensor]:
    """Returns posteriors [N], and which classes were split [C]. Others use the split of all classes together."""
    large = labels.bincount(minlength=classes) >= MIN_SAMPLES
    fitted = labels if large.all() else torch.where(large[labels], labels, -1)
    by_class, bimodal = _split(losses, fitted, classes, min_wrong_loss)
    if bimodal.all():
        return by_class, bimodal
    together, separated = _split_together(losses, labels, classes, min_wrong_loss)
    return torch.where(bimodal[labels], by_class, together), bimodal | (~large & separated)


def _split_together(losses: Tensor, labels: Tensor, classes: int, min_wrong_loss: float) -> tuple[Tensor, Tensor]:
    """Returns posteriors [N] of one mixture, and whether it has two modes [C]. If not, finite losses get 1."""
    posterior, bimodal = _split(losses, torch.zeros_like(labels), 1, min_wrong_loss)
    return torch.where(bimodal | losses.isinf(), posterior, 1.0), bimodal.expand(classes)


def _check(losses: Tensor, labels: Tensor, num_classes: int | None) -> tuple[Tensor, Tensor, int]:
    if not losses.is_floating_point() or losses.ndim != 1 or len(losses) == 0:
        raise ValueError(f"losses: {describe_tensor(losses)}: must be floats [N] with N > 0")
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != losses.shape:
        raise ValueError(f"labels: {describe_tensor(labels)}: must be integers {list(losses.shape)}")
    bad = losses.isnan() | (losses == -torch.inf)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"losses: {float(losses[first])} at sample {first} ({int(bad.sum())} of {len(losses)} are NaN or -inf): "
            "the model that gave them has diverged; use a lower learning rate"
        )
    labels = labels.to(losses.device).long()
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(f"labels: {int(labels[first])} at sample {first}: must be in 0..{classes - 1}")
    return losses, labels, classes


def _split(losses: Tensor, groups: Tensor, count: int, min_wrong_loss: float) -> tuple[Tensor, Tensor]:
    """Returns the posterior [N] of the lower mode, and which groups have an upper mode of wrong labels [count]."""
    fit = _fit(losses, groups, count)
    return fit.posterior.float(), _is_bimodal(fit, losses, groups) & (fit.mean[:, 1] > min_wrong_loss)


def _fit(losses: Tensor, groups: Tensor, count: int) -> Mixture:
    """Fits the mixture of each group, with a floor of the variances where the lower Gaussian shrinks onto a peak."""
    fit = mixture(losses, groups, count, monotone=True)
    variance = (fit.weight * fit.variance).sum(1) + fit.weight.prod(1) * (fit.mean[:, 1] - fit.mean[:, 0]) ** 2
    narrow = fit.variance[:, 0] < FLOOR * variance
    if not narrow.any():
        return fit
    wide = mixture(losses, groups, count, floor=FLOOR, monotone=True)
    shrunken = narrow & (wide.weight[:, 0] - fit.weight[:, 0] > MIN_WEIGHT_GAIN) & _is_bimodal(wide, losses, groups)
    chosen = shrunken[groups.clamp(min=0)]
    return Mixture(
        torch.where(chosen, wide.posterior, fit.posterior),
        *(
            torch.where(shrunken.view(-1, *[1] * (one.ndim - 1)), other, one)
            for one, other in zip(fit[1:], wide[1:], strict=True)
        ),
    )


def _is_bimodal(fit: Mixture, losses: Tensor, groups: Tensor) -> Tensor:
    """Returns which groups have two modes: BIC prefers them to one (3 parameters fewer), and Ashman's D is above 2."""
    count = len(fit.weight)
    used = (groups >= 0) & losses.isfinite()
    x, g = (losses, groups) if used.all() else (losses[used], groups[used])
    x = x.double()
    n = g.bincount(minlength=count).double()
    mean = g.bincount(x, count) / n
    variance = g.bincount((x - mean[g]) ** 2, count) / n
    single = -0.5 * n * ((2 * math.pi * variance).log() + 1)
    gain = 2 * (fit.log_likelihood - single) - 3 * n.log()
    distance = (fit.mean[:, 1] - fit.mean[:, 0]) / (fit.variance.sum(1) / 2).sqrt()
    return (gain > 0) & (distance > MIN_ASHMAN_D)  # NaN (no losses, or all equal) compares False


def budget_threshold(posterior: Tensor, groups: Tensor, count: int, budget: float) -> Tensor:
    """Returns each group's lowest threshold >= 0.5 with mean(1 - posterior) above it within the budget, [count].

    A group keeps the best tenth of its posteriors >= 0.5 even above the budget, so that every class has an anchor.
    """
    group, p = sort_by_group(groups, posterior)
    start = group.bincount(minlength=count).cumsum(0) - group.bincount(minlength=count)
    rank = torch.arange(1, len(group) + 1, device=group.device) - start[group]
    wrong = (1 - p).cumsum(0)
    before = torch.cat([wrong.new_zeros(1), wrong])[start.clamp(max=len(group))]
    high = p >= MIN_THRESHOLD
    kept = (torch.zeros_like(start).index_add_(0, group, high.long()) + KEEP_ONE_IN - 1) // KEEP_ONE_IN
    # The posteriors descend within a group, so the expected share of wrong labels grows.
    inside = high & (((wrong - before[group]) / rank <= budget) | (rank <= kept[group]))
    threshold = torch.ones(count, dtype=torch.float64, device=group.device)
    threshold.scatter_reduce_(0, group, torch.where(inside, p, 1.0), "amin")
    return threshold.clamp(min=MIN_THRESHOLD).float()


def sort_by_group(groups: Tensor, posterior: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts by group, then from the highest posterior; returns groups int64 [N] and posteriors float64 [N].

    groups: int64 [N] from 0. posterior: float32 [N] in [0, 1]. Packs each pair into one double, group + (1 - p) / 2,
    so that one sort of plain numbers is enough; ties are pairs with equal values. With G groups, p comes back exactly
    if p >= 0.5 and G < 2^27. On a CPU, NumPy's sort is used: with AVX2 and AVX-512 it takes 0.25 ms for 50 000 keys,
    PyTorch's takes 3 ms.
    """
    keys = groups + (1 - posterior.double()) / 2
    keys = torch.from_numpy(np.sort(keys.numpy())) if keys.device.type == "cpu" else keys.sort().values
    group = keys.long()
    return group, (1 - 2 * (keys - group)).to(posterior.dtype).double()
