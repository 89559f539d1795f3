"""A config with its data opened and checked, and the samples that are learned from: values, no stage yet."""

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
    """A config with its data opened and every cheap mistake already refused."""

    config: Config
    train: Dataset  # as given, with the noise that was asked for
    test: Dataset
    device: torch.device

    @property
    def epochs(self) -> int:
        """Expert epochs that are trained and stored: as many as matching can use, unless more were asked for."""
        match = self.config.match
        return self.config.experts.epochs or match.max_start + match.expert_epochs


def expert_identity(task: Task) -> dict[str, Any]:
    """What makes an expert reusable: everything its trajectory depends on."""
    config = task.config
    recipe = config.experts.model_dump(mode="json", exclude={"count", "epochs", "path", "workers"})
    labels = {"trust": config.trust.model_dump(mode="json"), "holdout": config.data.holdout}
    if config.trust.mode == "oracle" and task.train.clean_labels is not None:
        labels["clean"] = task.train.with_labels(task.train.clean_labels, None).fingerprint
    return {
        "data": task.train.fingerprint,
        **labels,
        "normalise": config.data.normalise,
        "augment": config.data.augment,
        "net": config.net.model_dump(mode="json"),
        "seed": config.seed,
        **recipe,
    }


def shared_experts_folder(task: Task) -> Path:
    """The folder of another run's experts; raises UserError where they are incomplete or were trained otherwise."""
    config, train = task.config.experts, task.train
    size = FlatNet(build(task.config.net, train.shape, train.num_classes, 0)).num_parameters
    return store.find(Path(config.path or ""), config.count, (task.epochs + 1, size), expert_identity(task))
