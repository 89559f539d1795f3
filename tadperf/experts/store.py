"""Expert trajectories on disk: one safetensors file per expert, read by the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tadperf import files
from tadperf.errors import UserError

IDENTITY = "experts.json"  # what the experts of a folder are experts of


def file(folder: Path, index: int) -> Path:
    """Where expert `index` is kept."""
    return folder / f"expert-{index:04d}.safetensors"


def save(folder: Path, index: int, snapshots: Tensor, **scores: float) -> None:
    """Writes one expert's snapshots [S, P], atomically, with its scores beside them."""
    files.save_tensors(
        file(folder, index), {"snapshots": snapshots}, {name: repr(score) for name, score in scores.items()}
    )


def complete(folder: Path, index: int, shape: tuple[int, int]) -> bool:
    """Whether expert `index` is there with at least the snapshots asked for; a file is written whole or not at all."""
    try:
        with safe_open(str(file(folder, index)), framework="pt") as handle:
            rows, parameters = handle.get_slice("snapshots").get_shape()
    except (FileNotFoundError, SafetensorError):
        return False
    return rows >= shape[0] and parameters == shape[1]


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Makes `folder` the place of the experts that `identity` describes; refuses one that holds others."""
    identity = json.loads(json.dumps(identity))
    note = folder / IDENTITY
    if note.exists():
        there = json.loads(note.read_text())
        for name, value in identity.items():
            if there.get(name) != value:
                raise UserError(
                    "--experts",
                    folder,
                    f"its experts have {name} = {there.get(name)}, this run needs {value}; take another folder",
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(note, identity)


class Experts(NamedTuple):
    """Trajectories in a folder; snapshot s of expert e is the weights after s epochs."""

    handles: list[Any]

    @classmethod
    def open(cls, folder: Path, count: int) -> Experts:
        return cls([safe_open(str(file(folder, index)), framework="pt").__enter__() for index in range(count)])

    def __len__(self) -> int:
        return len(self.handles)

    def snapshot(self, expert: int, epoch: int) -> Tensor:
        """Weights float32 [P]; only this row is read from the memory-mapped file."""
        return self.handles[expert].get_slice("snapshots")[epoch].to(torch.float32, copy=True)


def scores(folder: Path, count: int) -> list[float]:
    """Training accuracy of each expert's last snapshot."""
    return [float(handle.metadata()["train_accuracy"]) for handle in Experts.open(folder, count).handles]


def find(folder: Path, count: int, shape: tuple[int, int], identity: dict[str, Any]) -> Path:
    """The folder of experts that `folder` (a run, or the experts of one) holds; refuses unfit or incomplete ones."""
    if not folder.is_dir():
        raise UserError("--experts", folder, "there is no such folder; name a run folder that holds experts")
    place = folder / "experts" if (folder / "experts").is_dir() else folder
    if not (place / IDENTITY).exists():
        raise UserError("--experts", folder, "holds no experts; train some with: tadperf experts --out DIR")
    claim(place, identity)
    there = sum(complete(place, index, shape) for index in range(count))
    if there < count:
        raise UserError(
            "--experts",
            folder,
            f"holds {there} of {count} experts with {shape[0]} snapshots; train the rest with: tadperf experts",
        )
    return place
