"""The verdicts on all samples after a round, and their files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tadperf import files
from tadperf.data.dataset import describe_tensor
from tadperf.errors import UserError

SCHEMA = 1
VERDICTS = ("trusted", "recalled", "relabelled", "untrusted")
TRUSTED, RECALLED, RELABELLED, UNTRUSTED = range(len(VERDICTS))
DTYPES = {
    "given": torch.int64,
    "working": torch.int64,
    "verdict": torch.uint8,
    "reliability": torch.float32,
    "decided": torch.int16,
    "score": torch.float32,
    "suggested": torch.int64,
}


class TrustedView(NamedTuple):
    """The M samples to learn from: index int64 [M] (ascending), working labels int64 [M], weights float32 [M]."""

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    labels: Tensor
    weights: Tensor


@dataclass(frozen=True, repr=False)
class TrustState:
    """The state of all N samples after a round of the dual loop, in the order of the data.

    given: int64 [N], the labels as given. working: int64 [N], the labels to learn; only relabelled samples differ from
    `given`. verdict: uint8 [N], index into VERDICTS. reliability: float32 [N] in [0, 1], the probability that the
    working label is right, used as the weight. decided: int16 [N], the round that set the verdict. score: float32 [N]
    in [0, 1], how suspicious the given label is. suggested: int64 [N], the most probable class.
    Raises ValueError if a tensor has another type or shape, or a value is out of range.
    """

    given: Tensor
    working: Tensor
    verdict: Tensor
    reliability: Tensor
    decided: Tensor
    score: Tensor
    suggested: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, dtype in DTYPES.items():
            tensor = getattr(self, name)
            if (tensor.dtype, tensor.shape) != (dtype, self.given.shape) or tensor.ndim != 1:
                expected = f"{str(dtype).removeprefix('torch.')} [{self.given.numel()}]"
                raise ValueError(f"{name}: {describe_tensor(tensor)}: must be {expected}")
        limits = {"given": len(self.class_names), "verdict": len(VERDICTS)}
        limits |= {"working": limits["given"], "suggested": limits["given"]}
        for name, limit in limits.items():
            expected = f"in 0..{limit - 1}"
            _check_values(name, getattr(self, name), lambda x, limit=limit: (x >= 0) & (x < limit), expected)
        _check_values("reliability", self.reliability, lambda x: (x >= 0) & (x <= 1), "in [0, 1]")
        _check_values("score", self.score, torch.isfinite, "a finite number")

    def __len__(self) -> int:
        return len(self.given)

    def __repr__(self) -> str:
        counts = zip(VERDICTS, self.verdict.bincount(minlength=len(VERDICTS)).tolist(), strict=True)
        verdicts = ", ".join(f"{count} {name}" for name, count in counts)
        return f"TrustState({len(self)} labels of {len(self.class_names)} classes: {verdicts})"

    @property
    def trusted(self) -> Tensor:
        """Returns which samples are in the trusted view, bool [N]: trusted, recalled or relabelled."""
        return self.verdict != UNTRUSTED

    @property
    def issues(self) -> Tensor:
        """Returns the suspected label errors, bool [N]: samples that are untrusted or relabelled."""
        return (self.verdict == UNTRUSTED) | (self.verdict == RELABELLED)

    def view(self) -> TrustedView:
        """Returns the samples that experts, students and detectors learn from."""
        index = self.trusted.nonzero().squeeze(1)
        return TrustedView(index, self.working[index], self.reliability[index])

    def worst(self) -> Tensor:
        """Returns the indices of all samples int64 [N], the most suspicious first; equal scores keep their order."""
        return self.score.argsort(descending=True, stable=True)

    def counts(self) -> dict[str, list[int]]:
        """Returns the number of samples for each verdict and given class."""
        classes = len(self.class_names)
        return {
            name: self.given[self.verdict == code].bincount(minlength=classes).tolist()
            for code, name in enumerate(VERDICTS)
        }

    def pairs(self) -> list[tuple[str, str, int]]:
        """Returns (suggested class, given class, count) of the suspected label errors, the most frequent pair first."""
        wrong = self.issues & (self.suggested != self.given)
        classes = len(self.class_names)
        pair, count = (self.suggested * classes + self.given)[wrong].unique(return_counts=True)
        order = count.argsort(descending=True, stable=True)
        names = self.class_names
        return [
            (names[p // classes], names[p % classes], n)
            for p, n in zip(pair[order].tolist(), count[order].tolist(), strict=True)
        ]

    def save(self, path: Path | str) -> None:
        """Writes one safetensors file, atomically."""
        tensors = {name: getattr(self, name) for name in DTYPES}
        names = json.dumps(list(self.class_names), ensure_ascii=False)
        files.save_tensors(path, tensors, {"tadperf_trust": str(SCHEMA), "class_names": names})

    @classmethod
    def load(cls, path: Path | str) -> TrustState:
        """Reads a file that `save` wrote. Raises UserError if it is absent, damaged or another kind of file."""
        tensors, metadata = files.load_tensors(path)
        if metadata.get("tadperf_trust") != str(SCHEMA):
            raise UserError("trust", path, f"not a trust file of schema {SCHEMA}; make one with: tadperf audit")
        try:
            names = json.loads(metadata["class_names"])
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("class_names: must be a list of names")
            return cls(**{name: tensors[name] for name in DTYPES}, class_names=tuple(names))
        except KeyError as error:
            raise UserError("trust", path, f"is damaged: {error} is missing; write it again") from None
        except (ValueError, RecursionError) as error:
            raise UserError("trust", path, f"is damaged: {error}; write it again") from None

    def export(self, path: Path | str, file_names: Sequence[str] | None = None) -> None:
        """Writes a table, the most suspicious sample first, as .csv or .parquet. Raises UserError for another ending.

        Columns: file (only with `file_names`, those of the Dataset), index, verdict, score, given_label,
        suggested_label, label (the working label, empty if untrusted), reliability, round, and the class numbers of the
        three labels: given_number, suggested_number, label_number. The other labels are class names.
        `report.words.COLUMNS` explains them. `--labels` and `replace_labels` read the CSV: they use the column label,
        and leave out a sample without one.
        """
        path = Path(path)
        writers = {".csv": _csv, ".parquet": _parquet}
        if path.suffix.lower() not in writers:
            raise UserError("--out", path, "must end in .csv or .parquet")
        files.write_bytes(path, writers[path.suffix.lower()](self.table(file_names)))

    def table(self, file_names: Sequence[str] | None = None) -> dict[str, list[Any]]:
        """Returns the columns of `export`, the most suspicious sample first."""
        order = self.worst()
        given, suggested, working = (x[order].tolist() for x in (self.given, self.suggested, self.working))
        names, trusted, index = self.class_names, self.trusted[order].tolist(), order.tolist()
        used = [label if ok else None for label, ok in zip(working, trusted, strict=True)]
        return {
            **({} if file_names is None else {"file": [file_names[i] for i in index]}),
            "index": index,
            "verdict": [VERDICTS[code] for code in self.verdict[order].tolist()],
            "score": self.score[order].tolist(),
            "given_label": [names[label] for label in given],
            "suggested_label": [names[label] for label in suggested],
            "label": [None if label is None else names[label] for label in used],
            "reliability": self.reliability[order].tolist(),
            "round": self.decided[order].tolist(),
            "given_number": given,
            "suggested_number": suggested,
            "label_number": used,
        }


def as_given(labels: Tensor, class_names: tuple[str, ...], suggested: Tensor | None = None) -> TrustState:
    """Trusts every given label (mode "off"). With `suggested`, labels that differ from it are untrusted ("oracle")."""
    suggested = labels if suggested is None else suggested
    wrong = labels != suggested
    return TrustState(
        given=labels,
        working=labels,
        verdict=(wrong * UNTRUSTED).to(torch.uint8),
        reliability=(~wrong).float(),
        decided=torch.zeros(len(labels), dtype=torch.int16, device=labels.device),
        score=wrong.float(),
        suggested=suggested,
        class_names=class_names,
    )


def _check_values(name: str, values: Tensor, valid: Callable[[Tensor], Tensor], expected: str) -> None:
    """Raises ValueError for the first value that is not valid."""
    wrong = ~valid(values)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(f"{name}: {values[first].item()} at sample {first}: must be {expected}")


def _csv(table: dict[str, list[Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return text.getvalue().encode(errors="backslashreplace")  # a lone surrogate in a name


def _parquet(table: dict[str, list[Any]]) -> memoryview:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer)
    return buffer.getbuffer()
