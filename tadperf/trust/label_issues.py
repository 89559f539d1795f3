"""Finds label errors in the place of cleanlab.filter.find_label_issues."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tadperf.data.convert import as_tensor
from tadperf.data.dataset import describe_tensor
from tadperf.trust.channel import most_suspicious, noise_channel
from tadperf.trust.label_filters import COUNTED, FILTERS, confident_filter
from tadperf.trust.quality import METHODS, check_input, rank_score

log = logging.getLogger(__name__)


def find_label_issues(
    labels: ArrayLike | Tensor,
    pred_probs: ArrayLike | Tensor | None = None,
    features: ArrayLike | Tensor | None = None,
    *,
    return_indices_ranked_by: str | None = None,
    rank_by_kwargs: dict[str, Any] | None = None,
    filter_by: str = FILTERS[0],
    frac_noise: float = 1.0,
    num_to_remove_per_class: ArrayLike | None = None,
    min_examples_per_class: int = 1,
    confident_joint: ArrayLike | None = None,
    n_jobs: int | None = None,
    verbose: bool = False,
    multi_label: bool = False,
) -> np.ndarray:
    """Finds label errors from a model's probabilities, from features, or from both (tadperf).

    Has the arguments of cleanlab.filter.find_label_issues 2.9. labels: integers [N] in 0..C-1. pred_probs: [N, C], from
    a model that was not trained on the samples. features: floats [N, D]; they give out-of-fold probabilities.
    Returns a bool mask [N], True for an issue. With `return_indices_ranked_by`, a method of `label_quality_scores`,
    returns the indices of the issues, the most suspicious first. rank_by_kwargs: may hold adjust_pred_probs.
    filter_by: the default estimates the rates of label noise with `noise_channel` and returns the labels that maximise
    the expected F1 (`most_suspicious`). The others are the filters of confident learning.
    confident_joint: counts [C, C] (given, true) for the filters that prune; each row is scaled to its number of labels.
    num_to_remove_per_class: errors in each class, [C] or one number. With one of these two, the default prunes by
    confident learning, too. frac_noise: share of the issues to return, for the filters that prune. n_jobs: not used.
    min_examples_per_class: this number of samples of a class are no issues. verbose: logs their number.
    Raises ValueError for wrong shapes, types, labels or probabilities, and for values or combinations of the arguments
    that are not supported.
    """
    adjust = _check_options(return_indices_ranked_by, rank_by_kwargs, filter_by, n_jobs, multi_label)
    _check_limits(frac_noise, min_examples_per_class)
    _check_combination(filter_by, frac_noise, num_to_remove_per_class, confident_joint)
    given, p = check_input(labels, pred_probs, features)
    joint, remove = _check_joint(confident_joint, p.shape[1]), _check_remove(num_to_remove_per_class, given, p.shape[1])
    if uses_channel := filter_by == FILTERS[0] and joint is remove is None:
        order = most_suspicious(noise_channel(p, given).odds)
        order = order[: round(frac_noise * len(order))]
    else:
        order = _pruned(given, p, confident_filter(filter_by, given, p, joint, remove, frac_noise))
    order = leave_enough(order, given, min_examples_per_class)
    if verbose:
        log.info("%d issues in %d labels", len(order), len(given))
    if return_indices_ranked_by is None:
        return torch.zeros(len(given), dtype=torch.bool).index_fill_(0, order, True).numpy()
    if uses_channel and return_indices_ranked_by == METHODS[0]:
        return order.numpy()  # in this order already
    score = rank_score(return_indices_ranked_by, given, p, adjust)
    return order[score[order].argsort(stable=True)].numpy()


def _pruned(labels: Tensor, p: Tensor, issues: Tensor) -> Tensor:
    """Returns the indices of a mask [N], the label with the smallest probability first."""
    order = issues.nonzero().squeeze(1)
    return order[rank_score("self_confidence", labels, p)[order].argsort(stable=True)]


def _check_limits(frac_noise: float, min_examples_per_class: int) -> None:
    if not 0 <= frac_noise <= 1:
        raise ValueError(f"frac_noise: {frac_noise}: must be a share in [0, 1]")
    if min_examples_per_class < 0:
        raise ValueError(f"min_examples_per_class: {min_examples_per_class}: must be 0 or more")


def _check_options(
    ranked_by: str | None, kwargs: dict[str, Any] | None, filter_by: str, n_jobs: int | None, multi_label: bool
) -> bool:
    """Raises ValueError for a value that is not supported. Returns adjust_pred_probs."""
    if multi_label:
        raise ValueError("multi_label: True: must be False: samples with several labels are not supported")
    if ranked_by is not None and ranked_by not in METHODS:
        raise ValueError(f"return_indices_ranked_by: {ranked_by!r}: must be None or one of {', '.join(METHODS)}")
    if filter_by not in FILTERS:
        raise ValueError(f"filter_by: {filter_by!r}: must be one of {', '.join(FILTERS)}")
    if n_jobs is not None and n_jobs < 1:
        raise ValueError(f"n_jobs: {n_jobs}: must be None or 1 or more")
    unknown = set(kwargs or {}) - {"adjust_pred_probs"}
    if unknown:
        raise ValueError(f"rank_by_kwargs: {', '.join(sorted(unknown))}: only adjust_pred_probs is supported")
    adjust = bool((kwargs or {}).get("adjust_pred_probs", False))
    if adjust and ranked_by not in METHODS[1:3]:
        raise ValueError(f"rank_by_kwargs: adjust_pred_probs: needs ranking by {METHODS[1]} or {METHODS[2]}")
    return adjust


def _check_combination(
    filter_by: str, frac_noise: float, remove: ArrayLike | None, confident_joint: ArrayLike | None
) -> None:
    if filter_by in COUNTED:
        return
    for name, used in {"frac_noise": frac_noise != 1, "num_to_remove_per_class": remove is not None}.items():
        if used:
            raise ValueError(f"{name}: does not work with filter_by {filter_by}; use {', '.join(COUNTED)}")
    if confident_joint is not None:  # not an error: a search over filters passes it to all of them, as with cleanlab
        warnings.warn(f"confident_joint: filter_by {filter_by} does not use it", UserWarning, stacklevel=3)


def _check_joint(joint: ArrayLike | None, classes: int) -> Tensor | None:
    if joint is None:
        return None
    counts = as_tensor("confident_joint", joint).cpu()
    shape = (classes, classes)
    if counts.shape != shape or not counts.double().isfinite().all() or (counts < 0).any():
        raise ValueError(f"confident_joint: {describe_tensor(counts)}: must be counts {list(shape)}, 0 or more")
    return counts.double()


def _check_remove(remove: ArrayLike | None, labels: Tensor, classes: int) -> Tensor | None:
    if remove is None:
        return None
    counts = as_tensor("num_to_remove_per_class", remove).cpu()
    if counts.shape not in ((), (classes,)) or counts.is_floating_point():
        raise ValueError(f"num_to_remove_per_class: {describe_tensor(counts)}: must be integers [{classes}]")
    counts = counts.expand(classes)
    size = labels.bincount(minlength=classes)
    wrong = ((counts < 0) | (counts > size)).nonzero().flatten()
    if len(wrong):
        k = int(wrong[0])
        raise ValueError(f"num_to_remove_per_class: {int(counts[k])} for class {k}: must be in 0..{int(size[k])}")
    return counts.long()


def leave_enough(order: Tensor, labels: Tensor, least: int) -> Tensor:
    """Drops the last issues of each class in `order` until `least` of its samples are not issues."""
    class_sizes = labels.bincount()
    most_issues = (class_sizes - least).clamp(min=0)
    issue_labels = labels[order]
    by_class = issue_labels.argsort(stable=True)
    counts = issue_labels.bincount(minlength=len(class_sizes))
    start = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(order)) - start[issue_labels[by_class]]
    return order[rank < most_issues[issue_labels]]
