"""What a distillation would do, for `--dry-run`. Opens and checks everything; computes and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tadperf.compute import ranks
from tadperf.compute.device import check_ranks, describe_device
from tadperf.config import Config
from tadperf.config.schema import flatten_sections
from tadperf.data.dataset import Dataset
from tadperf.pipeline.compare import MODES
from tadperf.pipeline.prepare import prepare
from tadperf.progress import Progress, silent
from tadperf.refine.detector import build_detector, load_detector
from tadperf.run.folder import check_unchanged, finished_result, stored_config
from tadperf.task.task import Task


def stage_names(config: Config) -> list[str]:
    """Returns the stages of a new run, in their order."""
    stages = ["data"] + ["trust"] * (config.trust.mode == "on")
    if config.synthesis != "matching":
        stages += ["detector", "diffusion", "refine"]
    if config.synthesis != "generative":
        stages += ["experts"] * (config.experts.path is None) + ["matching"]
    return [*stages, "evaluate"]


def plan_distill(
    config: Config, out: Path, resume: bool, compare: bool, processes: int, progress: Progress = silent
) -> dict[str, Any]:
    """Returns what `tadperf distill` would do with this config and folder.

    {"data", "settings", "stages", "device", "processes", "folder", "other_folders", "resume"}: "settings" holds the
    fields that differ from the defaults. A finished run has no stages.
    processes: how many would work on this machine. Raises UserError as a run would.
    """
    stored = stored_config(out) if resume else None
    if stored is not None:
        check_unchanged(out, stored, config)
    finished = resume and finished_result(out, config) is not None
    task = prepare(config, progress)
    if processes > 1 and ranks.environment_world_size() == 1 and task.device.type == "cuda":
        check_ranks(config.device, processes, processes)  # torchrun's ranks may be on several machines
    _check_detector(task)
    modes = [mode for mode in MODES if mode != "oracle" or task.train.clean_labels is not None]
    others = [out / "compare" / mode for mode in modes if mode != config.trust.mode] if compare else []
    return {
        "data": _describe_data(task),
        "settings": changed_settings(config),
        "stages": [] if finished else stage_names(config),
        "device": f"{task.device} ({describe_device(task.device)})",
        "processes": processes,
        "folder": str(out),
        "other_folders": [str(folder) for folder in others],
        "resume": resume,
    }


def changed_settings(config: Config) -> dict[str, Any]:
    """Returns the dotted fields whose values differ from the defaults, with their values."""
    defaults = flatten_sections(Config().model_dump(mode="json"))
    values = flatten_sections(config.model_dump(mode="json"))
    return {field: value for field, value in values.items() if value != defaults[field]}


def _describe_data(task: Task) -> dict[str, Any]:
    train, test = _counts(task.train), _counts(task.test)
    return {
        "name": task.train.name,
        "source": task.train.source,
        "shape": list(task.train.shape),
        "train": len(task.train),
        "test": len(task.test),
        "broken": len(task.train.broken) + len(task.test.broken),
        "noise": task.config.data.noise,
        "classes": [
            {"class": name, "train": train[label], "test": test[label]}
            for label, name in enumerate(task.train.class_names)
        ],
    }


def _counts(data: Dataset) -> list[int]:
    return torch.bincount(data.labels, minlength=data.num_classes).tolist()


def _check_detector(task: Task) -> None:
    """Raises UserError if the user's detector does not fit the data."""
    config = task.config.detector
    if task.config.synthesis != "matching" and config.path:
        classes = task.train.num_classes
        load_detector(config.path, build_detector(config, task.train.images, classes, 0), classes)
