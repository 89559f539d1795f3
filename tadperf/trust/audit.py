"""Finds label errors without distillation: in a set of images, or from the probabilities of any model."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from tadperf.compute.device import resolve_device
from tadperf.compute.torch_settings import torch_settings
from tadperf.config import Config
from tadperf.config.merge import merge
from tadperf.config.schema import TrustConfig
from tadperf.data.convert import as_tensor
from tadperf.data.dataset import Dataset, describe_tensor
from tadperf.data.images import normalise_images
from tadperf.data.normalise import fit_normaliser
from tadperf.kernels import mixture
from tadperf.nets.problem import Problem
from tadperf.progress import Progress, silent
from tadperf.trust.loop import assign_verdicts, dual_loop, label_loss
from tadperf.trust.proxies import ProxyOutputs
from tadperf.trust.state import TrustState, as_given

MIN_PROBABILITY = 1e-6  # smaller probabilities are raised to this one; not tuned
ROW_SUM_TOLERANCE = 0.01  # bfloat16 rounds each probability by up to 0.2 %
RANKINGS = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")
FILTERS = (
    "prune_by_noise_rate",
    "prune_by_class",
    "both",
    "confident_learning",
    "predicted_neq_given",
    "low_normalized_margin",
    "low_self_confidence",
)


def audit(dataset: Dataset, config: Config | None = None, progress: Progress = silent) -> TrustState:
    """Runs the dual loop on a set of images and returns a verdict for every label (TAD; `dual_loop`).

    config: only the sections data (normalise, augment), net and trust, and seed, device and tf32 are used. None means
    the default preset for this set: a digits preset for the built-in digits, else `quick`. Does not read
    `dataset.clean_labels`.
    """
    if config is None:
        config = merge(options={"data.path": dataset.source.get("path", dataset.name)})
    device = resolve_device(config.device)
    with torch_settings(tf32=config.tf32):
        images = normalise_images(fit_normaliser(dataset.images, config.data.normalise), dataset.images, device)
        names, augment = dataset.class_names, config.data.augment
        problem = Problem(images, dataset.labels, names, config.net, augment, config.seed, device)
        return dual_loop(problem, config.trust.model_copy(update={"mode": "on"}), progress=progress).state


def find_label_issues(
    labels: ArrayLike | Tensor,
    pred_probs: ArrayLike | Tensor,
    features: ArrayLike | Tensor | None = None,
    *,
    return_indices_ranked_by: str | None = None,
    rank_by_kwargs: dict[str, Any] | None = None,
    filter_by: str = "prune_by_noise_rate",
    frac_noise: float = 1.0,
    num_to_remove_per_class: ArrayLike | None = None,
    min_examples_per_class: int = 1,
    confident_joint: ArrayLike | None = None,
    n_jobs: int | None = None,
    verbose: bool = False,
    multi_label: bool = False,
) -> np.ndarray:
    """Finds label errors from a model's probabilities; replaces cleanlab.filter.find_label_issues (tadperf).

    labels: integers [N] in 0..C-1. pred_probs: [N, C], preferably from a model that was not trained on the samples.
    features: [N, D] of the same samples. With features, runs one round of the dual loop, which also uses neighbours
    and anchors. Without features, uses the odds against the given label (`contradicted_labels`).
    Returns a bool mask [N], True for an issue. With `return_indices_ranked_by` (one of cleanlab's three names), returns
    the indices of the issues, the most suspicious first. All three names give the order of tadperf's score.
    frac_noise: share of the issues to return, the most suspicious ones. min_examples_per_class: at least this many
    samples of each class are not issues. n_jobs and verbose have no effect. The other arguments of cleanlab do not
    change the result either; setting one issues a UserWarning.
    Raises ValueError for wrong shapes or types, labels out of range, pred_probs that are not probabilities, unknown
    values of the arguments, and multi_label.
    """
    _check_options(return_indices_ranked_by, filter_by, frac_noise, min_examples_per_class, multi_label)
    given, probabilities, z = _check_arrays(labels, pred_probs, features)
    _warn_ignored(
        rank_by_kwargs=rank_by_kwargs or None,
        filter_by=None if filter_by == FILTERS[0] else filter_by,
        num_to_remove_per_class=num_to_remove_per_class,
        confident_joint=confident_joint,
    )
    if z is None:
        issues, score = contradicted_labels(probabilities, given)
    else:
        state = assign_verdicts_from_probabilities(given, probabilities, z)
        issues, score = state.issues, state.score
    if return_indices_ranked_by is None and frac_noise == 1 and _enough_left(issues, given, min_examples_per_class):
        return issues.numpy()  # without sorting, which takes half of the time
    order = issues.nonzero().squeeze(1)
    order = order[score[order].argsort(descending=True, stable=True)]
    order = _leave_enough(order, given, min_examples_per_class)[: round(frac_noise * len(order))]
    if return_indices_ranked_by is not None:
        return order.numpy()
    return torch.zeros_like(issues).index_fill_(0, order, True).numpy()


def contradicted_labels(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the labels that probabilities [N, C] contradict, bool [N], and the log odds [N] against each label.

    The odds compare the likeliest other class with the label. They follow two Gaussians: right labels and wrong labels.
    A label is an issue if another class is likelier and the upper Gaussian is more probable (tadperf). Losses are not
    used, because they end at 0: on simulated classifiers a mixture of losses found nothing in 10 of 18 cases.
    The mixture of odds has a higher F1 than cleanlab in 13 of them and a lower one in 5.
    """
    column = labels.unsqueeze(1)
    given_probability = probabilities.gather(1, column).squeeze(1)
    other_probability = probabilities.scatter(1, column, 0.0).amax(1)
    odds = (other_probability.clamp(min=MIN_PROBABILITY) / given_probability.clamp(min=MIN_PROBABILITY)).log()
    split = mixture(odds, torch.zeros_like(labels), 1, monotone=True)
    return (odds > 0) & (split.posterior < 0.5), odds


def assign_verdicts_from_probabilities(
    labels: Tensor, probabilities: Tensor, features: Tensor, seed: int = 0
) -> TrustState:
    """Runs one round of the dual loop on a model's probabilities [N, C] and features [N, D]."""
    directions = F.normalize(features - features.mean(0), dim=1)
    names = tuple(map(str, range(probabilities.shape[1])))
    outputs = ProxyOutputs(label_loss(probabilities, labels), probabilities, directions)
    return assign_verdicts(outputs, as_given(labels, names), 1, TrustConfig.model_validate({}), seed)


def _check_options(
    ranked_by: str | None, filter_by: str, frac_noise: float, min_examples_per_class: int, multi_label: bool
) -> None:
    """Raises ValueError for a value that cleanlab would refuse, and for those that tadperf does not support."""
    if multi_label:
        raise ValueError("multi_label: True: must be False: samples with several labels are not supported")
    if ranked_by is not None and ranked_by not in RANKINGS:
        raise ValueError(f"return_indices_ranked_by: {ranked_by!r}: must be None or one of {', '.join(RANKINGS)}")
    if filter_by not in FILTERS:
        raise ValueError(f"filter_by: {filter_by!r}: must be one of {', '.join(FILTERS)}")
    if not 0 <= frac_noise <= 1:
        raise ValueError(f"frac_noise: {frac_noise}: must be a share in [0, 1]")
    if min_examples_per_class < 0:
        raise ValueError(f"min_examples_per_class: {min_examples_per_class}: must be 0 or more")


def _warn_ignored(**arguments: object) -> None:
    """Warns about arguments that change cleanlab's result, but not tadperf's."""
    names = [name for name, value in arguments.items() if value is not None]
    if names:
        warnings.warn(f"find_label_issues ignores {', '.join(names)}: tadperf has its own rule", stacklevel=3)


def _check_arrays(
    labels: ArrayLike | Tensor, pred_probs: ArrayLike | Tensor, features: ArrayLike | Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns labels int64, probabilities and features float32, on the CPU. Raises ValueError if one is wrong."""
    given, p = as_tensor("labels", labels).cpu(), as_tensor("pred_probs", pred_probs).cpu()
    if p.ndim != 2 or p.shape[1] < 2 or not p.is_floating_point() or not len(p):
        raise ValueError(f"pred_probs: {describe_tensor(p)}: must be floats [N, C] with N >= 1 and C >= 2")
    if given.shape != p.shape[:1] or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"labels: {describe_tensor(given)}: must be integers {list(p.shape[:1])}")
    given, p = given.long(), p.float()
    wrong = (given < 0) | (given >= p.shape[1])
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"labels: {int(given[row])} at sample {row}: must be in 0..{p.shape[1] - 1}")
    z = None if features is None else as_tensor("features", features).cpu()
    if z is not None and (z.ndim != 2 or len(z) != len(p) or not z.is_floating_point()):
        raise ValueError(f"features: {describe_tensor(z)}: must be floats [{len(p)}, D]")
    for name, values in (("pred_probs", p), ("features", z)):
        if values is not None and not values.isfinite().all():
            row = int((~values.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"{name}: NaN or infinite value at sample {row}: must be finite")
    _check_probabilities(p)
    return given, p, None if z is None else z.float()


def _check_probabilities(p: Tensor) -> None:
    """Raises ValueError for logits, log probabilities and other rows that are not distributions."""
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


def _enough_left(issues: Tensor, labels: Tensor, least: int) -> bool:
    """Returns whether every class keeps `least` samples that are not issues, or all samples if it has fewer."""
    left = labels.bincount() - labels[issues].bincount(minlength=int(labels.max()) + 1)
    return bool((left >= labels.bincount().clamp(max=least)).all())


def _leave_enough(order: Tensor, labels: Tensor, least: int) -> Tensor:
    """Drops the least suspicious issues of each class until `least` of its samples are not issues."""
    class_sizes = labels.bincount()
    most_issues = (class_sizes - least).clamp(min=0)
    issue_labels = labels[order]
    by_class = issue_labels.argsort(stable=True)
    counts = issue_labels.bincount(minlength=len(class_sizes))
    start = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(order)) - start[issue_labels[by_class]]
    return order[rank < most_issues[issue_labels]]
