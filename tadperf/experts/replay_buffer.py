"""Experts of the published code of MTT, FTD, TESLA and DATM: files replay_buffer_*.pt of torch.save."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tadperf.data.torch_file import load_torch_file
from tadperf.errors import UserError
from tadperf.experts.store import Experts

FIELD = "--experts"
Snapshot = list[Tensor]  # the parameters of a network after an epoch, in their order


class BufferExperts(Experts):
    """Experts in memory. snapshots: [S, P] of each expert, float32."""

    def __init__(self, snapshots: list[Tensor]) -> None:
        self._snapshots = snapshots

    def __len__(self) -> int:
        return len(self._snapshots)

    def rows(self, expert: int, epochs: range) -> Tensor:
        return self._snapshots[expert][epochs.start : epochs.stop]

    def train_accuracies(self) -> list[float]:
        raise UserError(FIELD, "a replay buffer", "holds no train accuracy; train experts with: tadperf experts")


def buffer_files(path: Path) -> list[Path]:
    """Returns the files of a replay buffer: the file itself, or replay_buffer_0.pt, _1.pt, ... of a folder.

    Returns an empty list for anything else.
    """
    if path.suffix == ".pt" and not path.is_dir():
        return [path]
    numbers = {file: file.stem.removeprefix("replay_buffer_") for file in path.glob("replay_buffer_*.pt")}
    return sorted((file for file, number in numbers.items() if number.isdecimal()), key=lambda f: int(numbers[f]))


def check_buffer(path: Path, count: int, epochs: int, shapes: Sequence[torch.Size]) -> list[list[Snapshot]]:
    """Returns the first `count` experts of a replay buffer, memory-mapped, with the snapshots of epochs 0 to `epochs`.

    shapes: those of the network's parameters. Code in a file does not run. Raises UserError if experts, epochs or
    parameters are missing or have other shapes, or if a file holds anything else.
    """
    experts: list[list[Snapshot]] = []
    for file in buffer_files(path):
        experts += _trajectories(load_torch_file(file, FIELD, mapped=True), file, epochs, shapes)
        if len(experts) >= count:
            return experts[:count]
    remedy = f"holds {len(experts)} of {count} experts; use --set experts.count={max(1, len(experts))}, or add files"
    raise UserError(FIELD, path, remedy)


def load_buffer(path: Path, count: int, epochs: int, shapes: Sequence[torch.Size]) -> BufferExperts:
    """Reads the experts of a replay buffer as float32. Arguments and errors as for `check_buffer`, and for NaN."""
    snapshots = []
    for number, expert in enumerate(check_buffer(path, count, epochs, shapes)):
        rows = torch.stack([torch.cat([p.detach().float().reshape(-1) for p in snapshot]) for snapshot in expert])
        if not rows.isfinite().all():
            raise UserError(FIELD, path, f"expert {number} holds NaN or infinite weights; use other experts")
        snapshots.append(rows)
    return BufferExperts(snapshots)


def _trajectories(content: Any, file: Path, epochs: int, shapes: Sequence[torch.Size]) -> list[list[Snapshot]]:
    """Returns the experts of one file, checked."""
    if not isinstance(content, list) or not content or not all(isinstance(expert, list) for expert in content):
        raise UserError(FIELD, file, "is no replay buffer: must hold a list of experts, each a list of snapshots")
    for number, expert in enumerate(content):
        if len(expert) <= epochs:
            remedy = (
                f"expert {number} has {max(0, len(expert) - 1)} epochs, this run needs {epochs}; lower experts.epochs"
            )
            raise UserError(FIELD, file, remedy)
        for snapshot in expert[: epochs + 1]:
            _check_snapshot(snapshot, f"expert {number}", file, shapes)
    return [expert[: epochs + 1] for expert in content]


def _check_snapshot(snapshot: Any, name: str, file: Path, shapes: Sequence[torch.Size]) -> None:
    tensors = isinstance(snapshot, (list, tuple)) and all(
        isinstance(p, Tensor) and p.is_floating_point() and p.layout == torch.strided for p in snapshot
    )
    if not tensors:
        raise UserError(FIELD, file, f"is no replay buffer: a snapshot of {name} is no list of float tensors")
    stored = [p.shape for p in snapshot]
    if stored != list(shapes):
        pairs = [(i, list(a), list(b)) for i, (a, b) in enumerate(zip(stored, shapes, strict=False)) if a != b]
        counts = f"{len(stored)} parameters, not {len(shapes)}"
        difference = counts if not pairs else "parameter {} of shape {}, not {}".format(*pairs[0])
        raise UserError(
            FIELD, file, f"{name} has {difference}; set net.width, net.depth and net.norm as it was trained"
        )
