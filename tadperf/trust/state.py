"""What trust decides about every sample, and its forms on disk."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tadperf import files
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
    """The samples to learn from: index int64 [M] (ascending), their working labels int64 [M], weights float32 [M]."""

    index: Tensor
    labels: Tensor
    weights: Tensor


@dataclass(frozen=True)
class TrustState:
    """Where every sample stands after the dual loop; one entry per sample, in the order of the data.

    given: int64 [N], the labels as they came. working: int64 [N], the label to learn (the given one but where
    relabelled). verdict: uint8 [N], index into VERDICTS. reliability: float32 [N] in [0, 1], the probability that the
    working label is right; the weight in the view. decided: int16 [N], the round that gave the verdict. score: float32
    [N] in [0, 1], how suspicious the given label is (sort descending for the worst first). suggested: int64 [N], the
    class held most probable.
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
            assert (tensor.dtype, tensor.shape) == (dtype, self.given.shape), (name, tensor.dtype, tensor.shape)

    def __len__(self) -> int:
        return len(self.given)

    @property
    def trusted(self) -> Tensor:
        """Whether a sample is in the view, bool [N]: trusted, recalled or relabelled."""
        return self.verdict != UNTRUSTED

    @property
    def issues(self) -> Tensor:
        """Whether the given label is held wrong, bool [N]: not in the view under that label."""
        return (self.verdict == UNTRUSTED) | (self.verdict == RELABELLED)

    def view(self) -> TrustedView:
        """The trusted space: what experts, students and detectors learn from."""
        index = self.trusted.nonzero().squeeze(1)
        return TrustedView(index, self.working[index], self.reliability[index])

    def worst(self) -> Tensor:
        """Indices of all samples, the most suspicious first, int64 [N]; equals in the order of the data."""
        return self.score.argsort(descending=True, stable=True)

    def counts(self) -> dict[str, list[int]]:
        """Samples of each verdict by given class."""
        classes = len(self.class_names)
        return {
            name: self.given[self.verdict == code].bincount(minlength=classes).tolist()
            for code, name in enumerate(VERDICTS)
        }

    def pairs(self) -> list[tuple[str, str, int]]:
        """(suggested, given, samples) where an issue is held to be of another class, most frequent first."""
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
        """Reads what `save` wrote; raises UserError on anything else."""
        tensors, metadata = files.load_tensors(path)
        if metadata.get("tadperf_trust") != str(SCHEMA):
            raise UserError("trust", path, f"is no trust file of schema {SCHEMA}; make one with: tadperf audit")
        given = tensors.get("given")
        for name, dtype in DTYPES.items():
            tensor = tensors.get(name)
            if given is None or tensor is None or tensor.dtype != dtype or tensor.shape != given.shape:
                raise UserError("trust", path, f"its {name!r} is missing or of a wrong type or length; write it again")
        return cls(**{name: tensors[name] for name in DTYPES}, class_names=tuple(json.loads(metadata["class_names"])))

    def export(self, path: Path | str) -> None:
        """Writes a table, worst first, as .csv or .parquet by the name's ending; raises UserError on another.

        Columns: index, verdict, score, given_label, suggested_label, label (the working one; empty where untrusted),
        reliability, round. Labels are class names. `--labels` and `replace_labels` read the CSV back where no label is
        empty.
        """
        path = Path(path)
        writers = {".csv": _csv, ".parquet": _parquet}
        if path.suffix.lower() not in writers:
            raise UserError("--out", path, "must end in .csv or .parquet")
        files.write_bytes(path, writers[path.suffix.lower()](self.table()))

    def table(self) -> dict[str, list[Any]]:
        """The columns of `export`, worst first."""
        order = self.worst()

        def named(labels: Tensor) -> list[str]:
            return [self.class_names[label] for label in labels[order].tolist()]

        kept = self.trusted[order].tolist()
        return {
            "index": order.tolist(),
            "verdict": [VERDICTS[code] for code in self.verdict[order].tolist()],
            "score": self.score[order].tolist(),
            "given_label": named(self.given),
            "suggested_label": named(self.suggested),
            "label": [name if inside else None for name, inside in zip(named(self.working), kept, strict=True)],
            "reliability": self.reliability[order].tolist(),
            "round": self.decided[order].tolist(),
        }


def as_given(labels: Tensor, class_names: tuple[str, ...], suggested: Tensor | None = None) -> TrustState:
    """Every given label trusted (`mode="off"`); with `suggested` those that differ from it are left out ("oracle")."""
    wrong = torch.zeros(len(labels), dtype=torch.bool) if suggested is None else labels != suggested
    return TrustState(
        labels,
        labels,
        (wrong * UNTRUSTED).to(torch.uint8),
        (~wrong).float(),
        torch.zeros(len(labels), dtype=torch.int16),
        wrong.float(),
        labels if suggested is None else suggested,
        class_names,
    )


def _csv(table: dict[str, list[Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return text.getvalue().encode()


def _parquet(table: dict[str, list[Any]]) -> memoryview:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer)
    return buffer.getbuffer()
