"""The values that describe a run: its config, its data and its device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tadperf.config import Config
from tadperf.data.dataset import Dataset
from tadperf.experts import store
from tadperf.experts.replay_buffer import buffer_files, check_buffer
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet


@dataclass(frozen=True)
class Task:
    """A config with its data, opened and checked by `tadperf.pipeline.prepare.prepare`."""

    config: Config
    train: Dataset  # labels as given, with the noise that the config adds
    test: Dataset
    device: torch.device

    @property
    def epochs(self) -> int:
        """Epochs that an expert is trained and stored: experts.epochs, or as many as matching can use."""
        match = self.config.match
        return self.config.experts.epochs or match.max_start + match.expert_epochs


def expert_identity(task: Task) -> dict[str, Any]:
    """Returns everything that an expert's trajectory depends on. Runs with equal identities can share experts."""
    config = task.config
    recipe = config.experts.model_dump(mode="json", exclude={"count", "epochs", "path", "workers", "precision"})
    # An entry for float32 would refuse experts that were stored before there was a choice.
    precision = {} if config.experts.precision == "float32" else {"precision": config.experts.precision}
    # Without entries for None, experts that were stored before there were files of features still fit.
    labels = {"trust": config.trust.model_dump(mode="json", exclude_none=True), "holdout": config.data.holdout}
    if config.trust.mode == "oracle" and task.train.clean_labels is not None:
        labels["clean"] = task.train.with_labels(task.train.clean_labels, None).fingerprint
    return {
        "data": task.train.fingerprint,
        **labels,
        "normalise": config.data.normalise,
        "augment": config.data.augment,
        "net": config.net.model_dump(mode="json"),
        "seed": config.seed,
        # None on a CPU, so that experts that were stored before this entry existed still fit: all came from CPUs.
        "cuda": {"tf32": config.tf32, **precision} if task.device.type == "cuda" else None,
        **recipe,
    }


def shared_experts_folder(task: Task) -> Path:
    """Returns the folder of another run's experts, or the replay buffer, that experts.path names.

    Raises UserError if experts are missing there, or if this run would train other ones. A replay buffer does not tell
    its data and recipe, so only the shapes of its parameters are checked.
    """
    config, path, shapes = task.config.experts, Path(task.config.experts.path or ""), expert_shapes(task)
    if buffer_files(path):
        check_buffer(path, config.count, task.epochs, shapes)
        return path
    size = sum(shape.numel() for shape in shapes)
    return store.find_experts(path, config.count, (task.epochs + 1, size), expert_identity(task))


def expert_shapes(task: Task) -> list[torch.Size]:
    """Returns the shapes of the parameters of the experts' network."""
    return FlatNet(build(task.config.net, task.train.shape, task.train.num_classes, 0)).shapes
