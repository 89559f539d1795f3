"""Expert trajectories on disk: one safetensors file per expert. Readers load single rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tadperf import files
from tadperf.errors import UserError

IDENTITY = "experts.json"  # describes the data, network and recipe of the experts in a folder
RESIDENT_SHARE = 0.5  # of a CUDA device's free memory that snapshots may take; not tuned


def expert_path(folder: Path, index: int) -> Path:
    """Returns the file of expert `index`."""
    return folder / f"expert-{index:04d}.safetensors"


def save_expert(folder: Path, index: int, snapshots: Tensor, **scores: float) -> None:
    """Writes one expert's snapshots [S, P] atomically, with its scores in the file's metadata."""
    metadata = {name: repr(score) for name, score in scores.items()}
    files.save_tensors(expert_path(folder, index), {"snapshots": snapshots}, metadata)


def is_complete(folder: Path, index: int, shape: tuple[int, int]) -> bool:
    """Returns whether expert `index` is stored with at least shape[0] snapshots of exactly shape[1] parameters.

    A file is never half written. Raises UserError if it cannot be read.
    """
    path = expert_path(folder, index)
    try:
        with safe_open(str(path), framework="pt") as handle:
            stored = handle.get_slice("snapshots").get_shape()
    except (FileNotFoundError, SafetensorError):
        return False
    except OSError as error:
        raise UserError("--experts", path, f"cannot be read ({error}); check its permissions") from None
    return len(stored) == 2 and stored[0] >= shape[0] and stored[1] == shape[1]


def claim_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Creates `folder` for the experts that `identity` describes.

    Raises UserError if the folder holds other experts, or if its description is damaged.
    """
    identity = json.loads(json.dumps(identity))
    description = folder / IDENTITY
    if not description.exists():
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(description, identity)
        return
    try:
        stored = dict(json.loads(description.read_text()))
    except (ValueError, TypeError):
        remedy = "is damaged; delete the folder to train its experts again, or choose another folder"
        raise UserError("--experts", description, remedy) from None
    stored, identity = _used_settings(stored), _used_settings(identity)
    for name, value in identity.items():
        if stored.get(name) != value:
            remedy = f"its experts have {name} = {stored.get(name)}, this run needs {value}; choose another folder"
            raise UserError("--experts", folder, remedy)


def _used_settings(identity: dict[str, Any]) -> dict[str, Any]:
    """Returns an identity without the settings of trust that the modes off and oracle do not read.

    So experts still fit that a version with other such settings has trained.
    """
    trust = identity.get("trust")
    if isinstance(trust, dict) and trust.get("mode") in ("off", "oracle"):
        return identity | {"trust": {"mode": trust["mode"]}}
    return identity


class Experts:
    """The trajectories in a folder. Snapshot s of an expert holds the weights after s epochs.

    Files are memory-mapped and stay open until the object is deleted.
    """

    def __init__(self, paths: list[Path]) -> None:
        """paths: one file per expert. Raises UserError if a file is missing or damaged."""
        self._paths, self._files = paths, [_open(path) for path in paths]

    @classmethod
    def open(cls, folder: Path, count: int) -> Experts:
        """Opens experts 0 to `count` - 1 of a folder."""
        return cls([expert_path(folder, index) for index in range(count)])

    def __len__(self) -> int:
        return len(self._files)

    def rows(self, expert: int, epochs: range) -> Tensor:
        """Returns the snapshots [S, P] of some epochs in their stored type; reads only these rows of the file."""
        return self._files[expert].get_slice("snapshots")[epochs.start : epochs.stop]

    def snapshot(self, expert: int, epoch: int) -> Tensor:
        """Returns the weights as a new tensor float32 [P]."""
        return self.rows(expert, range(epoch, epoch + 1))[0].to(torch.float32, copy=True)

    def resident(self, device: torch.device, epochs: range) -> Experts | ResidentExperts:
        """Returns these experts with the snapshots of `epochs` on a CUDA device, or itself if they do not fit there.

        Reading them from the device again and again needs no copy from the CPU and no wait.
        """
        if device.type != "cuda":
            return self
        row = self.rows(0, range(1))
        needed = len(self) * len(epochs) * row.numel() * row.element_size()
        fits = needed <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
        return self.load_to(device, epochs) if fits else self

    def load_to(self, device: torch.device, epochs: range) -> ResidentExperts:
        """Returns these experts with the snapshots of `epochs` on a device."""
        return ResidentExperts([self.rows(e, epochs).to(device) for e in range(len(self))], epochs.start)

    def train_accuracies(self) -> list[float]:
        """Returns the training accuracy of each expert's last snapshot, a share in [0, 1].

        Raises UserError if a file does not hold it.
        """
        metadata = [file.metadata() or {} for file in self._files]
        for path, values in zip(self._paths, metadata, strict=True):
            if "train_accuracy" not in values:
                raise UserError("--experts", path, "has no train_accuracy; train it again with: tadperf experts")
        return [float(values["train_accuracy"]) for values in metadata]


class ResidentExperts:
    """Some snapshots of all experts on a device, in the type in which they are stored."""

    def __init__(self, snapshots: list[Tensor], first: int) -> None:
        """snapshots: [S, P] of each expert. first: the epoch of the first one."""
        self._snapshots, self._first = snapshots, first

    def __len__(self) -> int:
        return len(self._snapshots)

    def snapshot(self, expert: int, epoch: int) -> Tensor:
        """Returns the weights float32 [P] on the device. A view if they are stored as float32: do not write to it."""
        return self._snapshots[expert][epoch - self._first].float()


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        remedy = f"cannot be read ({error}); train it again with: tadperf experts"
        raise UserError("--experts", path, remedy) from None


def find_experts(folder: Path, count: int, shape: tuple[int, int], identity: dict[str, Any]) -> Path:
    """Returns the folder of the experts in `folder`, which is a run folder or the folder of the experts itself.

    shape: (snapshots, parameters) of an expert. Raises UserError if experts are missing, incomplete or do not match
    `identity`.
    """
    if not folder.is_dir():
        raise UserError("--experts", folder, "no such folder; give a run folder that holds experts")
    place = folder / "experts" if (folder / "experts").is_dir() else folder
    if not (place / IDENTITY).exists():
        raise UserError("--experts", folder, "holds no experts; train some with: tadperf experts --out DIR")
    claim_folder(place, identity)
    complete = sum(is_complete(place, index, shape) for index in range(count))
    if complete < count:
        remedy = f"holds {complete} of {count} experts with {shape[0]} snapshots; train the rest with: tadperf experts"
        raise UserError("--experts", folder, remedy)
    return place
