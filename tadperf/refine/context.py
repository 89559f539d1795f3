"""The values that every step of refinement needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tadperf.config import RefineConfig
from tadperf.progress import Progress
from tadperf.run.folder import Run
from tadperf.task.samples import NormalisedData, TrainingSamples
from tadperf.task.task import Task


@dataclass(frozen=True)
class RefineContext:
    """A task with its data, the samples that it learns from, and the run folder."""

    task: Task
    data: NormalisedData
    samples: TrainingSamples
    run: Run
    progress: Progress

    @property
    def config(self) -> RefineConfig:
        return self.task.config.refine

    @property
    def labels(self) -> Tensor:
        """Returns the class of every synthetic image, int64 [M], class by class; M = C * IPC."""
        return torch.arange(self.task.train.num_classes).repeat_interleave(self.task.config.match.ipc)

    @property
    def certain_labels(self) -> Tensor:
        """Returns the labels of the training samples, int64 [N] on the CPU; -1 if trust did not confirm the label."""
        return self.samples.labels.where(self.samples.confirmed, -1).cpu()

    def pixels(self, index: Tensor) -> Tensor:
        """Returns training samples as uint8 [B, channels, H, W]; index: int64 [B]."""
        return self.data.normaliser.invert(self.samples.images[index])
