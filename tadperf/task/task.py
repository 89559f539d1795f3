"""The values that describe a run: its config, its data and its device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tadperf.config import Config
from tadperf.data.dataset import Dataset
from tadperf.experts import store
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
    """Returns the folder of another run's experts, named by experts.path.

    Raises UserError if experts are missing there, or if this run would train other ones.
    """
    config, train = task.config.experts, task.train
    size = FlatNet(build(task.config.net, train.shape, train.num_classes, 0)).num_parameters
    return store.find_experts(Path(config.path or ""), config.count, (task.epochs + 1, size), expert_identity(task))
