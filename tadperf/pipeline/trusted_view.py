"""Opens the training images and the trusted labels that a distilled file was made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tadperf.artifact import DistilledSet
from tadperf.config import Config
from tadperf.data.images import normalise_images
from tadperf.data.objects import FORMAT
from tadperf.errors import UserError
from tadperf.pipeline.prepare import prepare
from tadperf.progress import Progress, silent
from tadperf.refine.start import starting_trust
from tadperf.task.samples import NormalisedData, SampleSelection, TrainingSamples, select_samples, training_samples
from tadperf.task.task import Task
from tadperf.trust.state import RECALLED, TRUSTED


def open_trusted_view(
    distilled: DistilledSet, folder: Path, device: torch.device, progress: Progress = silent
) -> tuple[Task, TrainingSamples]:
    """Returns the task of the run in `folder`, and the samples that it learned from, normalised as the set.

    Raises UserError if the training images cannot be opened or have changed, or if trust.safetensors is missing.
    """
    task = replace(prepare(_config(distilled), progress), device=device)
    if distilled.data.get("fingerprint") != task.train.fingerprint:
        raise UserError("file", task.train.name, "its training images or labels have changed; distil them again")
    images = normalise_images(distilled.normaliser, task.train.images, device)
    data = NormalisedData(distilled.normaliser, images, task.train.labels, images, task.train.labels)
    return task, training_samples(data, _selection(task, folder))


def _config(distilled: DistilledSet) -> Config:
    config, source = Config.model_validate(distilled.config), distilled.data.get("source", {})
    if source.get("format") == FORMAT:
        raise UserError("--protocol", distilled.data.get("name"), "needs training images from a path, not from Python")
    data = config.data.model_copy(update={"path": source.get("path", config.data.path)})
    return config.model_copy(update={"data": data})


def _selection(task: Task, folder: Path) -> SampleSelection:
    """Returns the samples that the run has selected, as `pipeline.trusted.trusted_samples` does."""
    train, mode = task.train, task.config.trust.mode
    if mode != "on":
        labels = train.clean_labels if mode == "oracle" else train.labels
        assert labels is not None
        return select_samples(task, torch.arange(len(train)), labels)
    if not (folder / "trust.safetensors").exists():
        remedy = "trust.safetensors is not beside the file; --protocol needs the trusted labels, so give the run folder"
        raise UserError("file", folder, remedy)
    state = starting_trust(folder, train)
    index, labels, weights = state.view()
    verdict = state.verdict[index]
    return select_samples(task, index, labels, weights, (verdict == TRUSTED) | (verdict == RECALLED))
