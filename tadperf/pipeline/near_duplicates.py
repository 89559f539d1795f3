"""Lists the near duplicates of a set for `tadperf audit --near-duplicates`: as a result, as CSV, and for the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tadperf.compute.device import resolve_device
from tadperf.config import Config
from tadperf.data.dataset import Dataset
from tadperf.data.label_file import LabelSet
from tadperf.data.layout import ReadOptions
from tadperf.data.open import open_test_split
from tadperf.errors import UserError
from tadperf.files import write_bytes
from tadperf.progress import Progress, silent
from tadperf.report.page import ShownPairs
from tadperf.trust.duplicates import FEATURE_THRESHOLD, THRESHOLD, find_duplicates, find_leaks
from tadperf.trust.evidence import open_evidence

LISTED = 10  # pairs that the result names; the list holds all
COLUMNS: tuple[str, ...] = (
    "kind",  # train: both are training samples; leak: the second one is a test sample
    "different_labels",
    "exact",
    "similarity",
    "first",  # file or row
    "first_label",
    "second",
    "second_label",
)


class Pair(NamedTuple):
    """A row of the list, and the indices of both samples."""

    row: tuple[str, bool, bool, float, str, str, str, str]
    first: int
    second: int


class NearDuplicates(NamedTuple):
    """All pairs: in the training split, those with different labels first, then between train and test.

    test: the test split; None if there is none, or no images. by_features: whether the user's features were compared.
    """

    pairs: list[Pair]
    test: Dataset | None
    by_features: bool

    def shown(self) -> ShownPairs:
        """Returns what the page needs."""
        rows: list[dict[str, Any]] = [dict(zip(COLUMNS, pair.row, strict=True)) for pair in self.pairs]
        return ShownPairs(rows, [(p.first, p.second) for p in self.pairs], self.test.images if self.test else None)


def open_test_of(train: Dataset, progress: Progress = silent) -> Dataset | None:
    """Opens the test split of the set that a training split came from. Returns None if there is none."""
    known = {field.name for field in fields(ReadOptions)} - {"labels"}
    options = {name: value for name, value in train.source.items() if name in known}
    test = open_test_split(train.source["path"], ReadOptions(**options, progress=progress))
    same = test is not None and test.shape[1:] == train.shape[1:] and test.num_classes == train.num_classes
    return test if same else None


def user_features(config: Config, train: Dataset | LabelSet, progress: Progress = silent) -> Tensor | None:
    """Returns the features of trust.features and trust.encoder, or None if neither is given."""
    trust = config.trust.model_copy(update={"probs": None})
    if trust.features is None and trust.encoder is None:
        return None
    return open_evidence(trust, train, resolve_device(config.device), progress).features


def list_duplicates(
    train: Dataset | LabelSet, features: Tensor | None = None, progress: Progress = silent
) -> NearDuplicates:
    """Finds the near duplicates in the training split, and between it and the test split (`trust.duplicates`).

    features: floats [N, D] of the user, compared besides the pixels, or alone for a set without images.
    Raises UserError if there is neither.
    """
    if train.images is None and features is None:
        raise UserError("--near-duplicates", train.name, "has no images; add --features FILE")
    progress("duplicates", 0, 2)
    found = find_duplicates(train.images, features)
    pairs = _pairs("train", found, train, train)
    pairs.sort(key=lambda pair: not pair.row[1])  # stable: the most similar pair of each kind stays first
    progress("duplicates", 1, 2)
    test = open_test_of(train) if isinstance(train, Dataset) else None
    if test is not None and isinstance(train, Dataset):
        channels = max(train.shape[0], test.shape[0])
        images, others = (split.images.expand(-1, channels, -1, -1) for split in (train, test))
        pairs += _pairs("leak", find_leaks(images, others), train, test)
    progress("duplicates", 2, 2)
    return NearDuplicates(pairs, test, features is not None)


def _pairs(kind: str, found: Any, train: Dataset | LabelSet, other: Dataset | LabelSet) -> list[Pair]:
    labels, other_labels = train.labels.tolist(), other.labels.tolist()
    names, other_names = train.class_names, other.class_names
    return [
        Pair(
            (
                kind,
                names[labels[a]] != other_names[other_labels[b]],
                exact,
                round(similarity, 4),
                _place(train.file_names, a),
                names[labels[a]],
                _place(other.file_names, b),
                other_names[other_labels[b]],
            ),
            a,
            b,
        )
        for a, b, similarity, exact in zip(*(values.tolist() for values in found), strict=True)
    ]


def _place(file_names: Sequence[str] | None, sample: int) -> str:
    return f"row {sample}" if file_names is None else file_names[sample]


def duplicates_result(found: NearDuplicates) -> dict[str, Any]:
    """Returns the counts and the first pairs, for the result of an audit."""
    rows = [pair.row for pair in found.pairs]
    inside = [row for row in rows if row[0] == "train"]
    return {
        "threshold": THRESHOLD,
        **({"feature_threshold": FEATURE_THRESHOLD} if found.by_features else {}),
        "in_train": len(inside),
        "different_labels": sum(row[1] for row in inside),
        "exact": sum(row[2] for row in rows),
        "leaks": None if found.test is None else len(rows) - len(inside),
        "pairs": [dict(zip(COLUMNS, row, strict=True)) for row in rows[:LISTED]],
    }


def duplicates_file(path: Path) -> Path:
    """Returns the file for the list of near duplicates, next to the list of labels."""
    return path.with_name(f"{path.stem}.duplicates.csv")


def save_duplicates(path: Path, found: NearDuplicates) -> None:
    """Writes all pairs as a CSV file, atomically."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([str(value).lower() if isinstance(value, bool) else value for value in p.row] for p in found.pairs)
    write_bytes(path, text.getvalue().encode(errors="backslashreplace"))
