"""An audit of labels from what a user has: features, class probabilities or both, of any kind of data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tadperf.compute import ranks
from tadperf.config import TrustConfig
from tadperf.data.convert import as_tensor
from tadperf.data.dataset import Dataset, describe_tensor
from tadperf.data.encoder import encode_images, find_model
from tadperf.data.label_file import LabelSet
from tadperf.data.matrix import check_features, check_probabilities, open_features, open_probabilities
from tadperf.errors import UserError, warn_user
from tadperf.progress import Progress, silent
from tadperf.trust.channel import most_suspicious, noise_channel
from tadperf.trust.correction import fit_pool, sure_classes
from tadperf.trust.label_issues import leave_enough
from tadperf.trust.large_audit import Suspicion, feature_probabilities, suspicion_of, suspicion_of_labels
from tadperf.trust.probe import pool_features
from tadperf.trust.state import RELABELLED, UNTRUSTED, TrustState
from tadperf.trust.top_classes import Probabilities, is_large

BUDGET: float = TrustConfig.model_fields["budget"].default
MAX_ODDS = 9.0  # float32 has 2070 numbers between its probability and 1
MIN_KAPPA = 0.05  # between the likeliest classes and the given labels; less looks like another order; not tuned


def audit_labels(
    labels: ArrayLike | Tensor,
    pred_probs: ArrayLike | Tensor | None = None,
    features: ArrayLike | Tensor | None = None,
    class_names: Sequence[str] | None = None,
    progress: Progress = silent,
    budget: float = BUDGET,
) -> TrustState:
    """Gives every label a verdict without images (tadperf).

    A label that `find_label_issues` returns is relabelled if another class is sure (`tadperf.trust.correction`), else
    untrusted. All other labels are trusted.

    labels: integers [N] in 0..C-1. pred_probs: [N, C], out of fold: from models that have not seen the label of the
    sample. features: floats [N, D], also memory-mapped. One of the two is enough; from features, `pool_features` makes
    probabilities out of fold. class_names: C names; by default "0".."C-1". budget: `trust.budget`.
    The state's score is 1 - `label_quality_scores` (`rankable`). It suggests the likeliest other class for an issue.
    The reliability of a new label is its probability; that of the other labels is `label_quality_scores`.
    Large sets (`is_large`) are audited in blocks of samples, which several ranks share (`large_audit`); others by rank
    0 alone.
    Raises ValueError for wrong shapes, types, labels or probabilities.
    """
    given, p, z, names = _check(labels, pred_probs, features, class_names)
    if is_large(len(given), len(names)):
        found = suspicion_of_labels(z, given, len(names), p, progress)
    else:
        found = ranks.once(lambda: _suspicion(given, p, z, len(names), progress))
    return _state(given, found, names, budget)


def _suspicion(given: Tensor, p: Tensor | None, z: Tensor | None, classes: int, progress: Progress) -> Suspicion:
    """Judges labels whose probabilities [N, C] fit in memory."""
    if z is not None:
        p = pool_features(z, given, classes, p, progress)
    assert p is not None
    p = p.float()
    return suspicion_of(p, given, noise_channel(p, given).odds, fit_pool(p, given))


def _state(given: Tensor, found: Suspicion, names: tuple[str, ...], budget: float) -> TrustState:
    """Returns the state of an audit. Its issues are those of `find_label_issues`."""
    odds, other = found.odds, found.other
    order = leave_enough(most_suspicious(odds), given, 1)
    issues = torch.zeros(len(given), dtype=torch.bool).index_fill_(0, order, True)
    relabelled = issues & (found.likeliest.candidate == other) & sure_classes(found.likeliest, len(names), budget)
    right = (-odds.double()).sigmoid().float()
    return TrustState(
        given=given,
        working=torch.where(relabelled, other, given),
        verdict=(issues * UNTRUSTED).to(torch.uint8).masked_fill_(relabelled, RELABELLED),
        reliability=torch.where(relabelled, found.likeliest.probability.clamp(0, 1), right),
        decided=torch.ones(len(given), dtype=torch.int16),
        score=rankable(odds),
        suggested=torch.where(issues, other, given),
        class_names=names,
    )


def rankable(odds: Tensor) -> Tensor:
    """Returns the probabilities [N] of log odds, float32, in an order that float32 can hold.

    Next to 1, float32 rounds all odds above 17 to the same number, so a list could not rank the labels that are wrong
    for certain. So odds above MAX_ODDS are spread evenly over the numbers between the probability of MAX_ODDS and 1.
    """
    odds = odds.double()
    highest = torch.tensor(MAX_ODDS, dtype=torch.float64).sigmoid()
    place = (odds - MAX_ODDS) / (odds.max() - MAX_ODDS + 1)  # in [0, 1) above MAX_ODDS
    return torch.where(odds > MAX_ODDS, 1 - (1 - highest) * (1 - place), odds.sigmoid()).float()


class Evidence(NamedTuple):
    """What a user gives beside images and labels: probabilities [N, C] out of fold, and features [N, D], on the CPU."""

    probabilities: Tensor | None = None
    features: Tensor | None = None

    def __bool__(self) -> bool:
        return self.probabilities is not None or self.features is not None


def open_evidence(
    config: TrustConfig, data: Dataset | LabelSet, device: torch.device, progress: Progress = silent
) -> Evidence:
    """Opens trust.probs and trust.features, or computes features with trust.encoder.

    data: the N samples. A file has a row for each of them, or also rows for the samples that are left out of the set.
    With an encoder and a file of features, each row holds both. Raises UserError if anything is wrong with a file.
    Warns if probabilities agree with the labels no better than chance.
    """
    p = z = None
    if config.probs is not None:
        p = open_probabilities(config.probs, "--probs", classes=data.num_classes)
        p = _rows_of(p, data, "--probs", config.probs)
        _warn_of_order(p, data, config.probs)
    if config.features is not None:
        z = _rows_of(open_features(config.features, "--features"), data, "--features", config.features)
    if config.encoder is not None:
        if not isinstance(data, Dataset):
            raise UserError("--encoder", config.encoder, "computes features of images; name DATA, a set of images")
        encoded = encode_images(config.encoder, data, device, progress)
        z = encoded if z is None else torch.cat([z.float(), encoded.float()], 1)
    return Evidence(p, z)


def check_evidence(config: TrustConfig, data: Dataset) -> None:
    """Raises UserError as `open_evidence` does, without computing features. Does nothing if trust is not on."""
    if config.mode == "on":
        open_evidence(config.model_copy(update={"encoder": None}), data, torch.device("cpu"))
        if config.encoder is not None:
            find_model(config.encoder)


def loop_signals(
    evidence: Evidence, labels: Tensor, num_classes: int, progress: Progress = silent
) -> tuple[tuple[Probabilities, ...], Tensor | None]:
    """Returns the evidence as `dual_loop` takes it: probabilities out of fold, and features.

    Features also give probabilities (`pool_features`; for large sets `feature_probabilities`). Only rank 0 computes
    them: it decides about the labels. In large sets files stay memory-mapped.
    """
    p, z = evidence
    if ranks.rank():
        return (), None
    if is_large(len(labels), num_classes):
        with ranks.working_alone():
            large = () if z is None else (feature_probabilities(z, labels, num_classes, progress),)
        return (*(() if p is None else (p,)), *large), z
    pooled = () if z is None else (pool_features(z, labels, num_classes, progress=progress),)
    return (*(() if p is None else (p.float(),)), *pooled), None if z is None else z.float()


def _rows_of(matrix: Tensor, data: Dataset | LabelSet, field: str, value: object) -> Tensor:
    """Returns the rows of the samples. Raises UserError if the number of rows is wrong."""
    if len(matrix) == len(data):
        return matrix
    opened = data.opened
    if data.rows is not None and len(matrix) == opened:
        return matrix[data.rows]
    number = f"{len(data)} samples" if opened == len(data) else f"{len(data)} samples ({opened} with those left out)"
    raise UserError(field, value, f"has {len(matrix)} rows; {data.name} has {number}: every sample needs one row")


def _warn_of_order(p: Tensor, data: Dataset | LabelSet, path: str) -> None:
    share, chance = agreement(p, data.labels)
    if share - chance < MIN_KAPPA * (1 - chance):
        names = ", ".join(data.class_names[:5]) + (", ..." if data.num_classes > 5 else "")
        warn_user(
            f"--probs: {path}: the likeliest class is the given label for {share:.0%} of the samples, by chance for "
            f"{chance:.0%}; rows must be in the order of the labels, columns in the order of the classes: {names}"
        )


def agreement(probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
    """Returns the share of samples whose likeliest class is the given label, and the share expected by chance."""
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    shares = [x.bincount(minlength=classes).double() / len(labels) for x in (predicted, labels)]
    return float((predicted == labels).double().mean()), float((shares[0] * shares[1]).sum())


def _check(
    labels: ArrayLike | Tensor,
    pred_probs: ArrayLike | Tensor | None,
    features: ArrayLike | Tensor | None,
    class_names: Sequence[str] | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[str, ...]]:
    """Returns labels int64 [N], the probabilities and the features on the CPU, and the class names."""
    if pred_probs is None and features is None:
        raise UserError("pred_probs", None, "give pred_probs [N, C], features [N, D], or both")
    given = as_tensor("labels", labels).cpu()
    if given.ndim != 1 or len(given) < 2 or given.is_floating_point() or given.dtype == torch.bool:
        raise UserError("labels", describe_tensor(given), "must be integers [N], for 2 samples or more")
    given = given.long()
    p = None if pred_probs is None else as_tensor("pred_probs", pred_probs).cpu()
    z = None if features is None else as_tensor("features", features).cpu()
    classes = None if class_names is None else len(class_names)
    if p is not None:
        check_probabilities(p, describe_tensor(p), "pred_probs", len(given), classes)
        classes = p.shape[1]
    if z is not None:
        check_features(z, describe_tensor(z), "features", len(given))
    classes = max(int(given.max()) + 1, 2) if classes is None else classes
    wrong = ((given < 0) | (given >= classes)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise UserError("labels", f"{int(given[row])} at sample {row}", f"must be in 0..{classes - 1}")
    return given, p, z, tuple(class_names) if class_names is not None else tuple(map(str, range(classes)))
