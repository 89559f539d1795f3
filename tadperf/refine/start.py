"""Starts from another run: takes its trusted view, its images, its detector and its diffusion model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tadperf import artifact, files
from tadperf.artifact import DistilledSet
from tadperf.config import Config
from tadperf.config.schema import flatten_sections
from tadperf.data.dataset import Dataset
from tadperf.errors import UserError
from tadperf.run.folder import Run, stored_config
from tadperf.task.task import Task
from tadperf.trust.state import TrustState

# FREE may differ from the other run's config. Trust, detector and diffusion model depend on UPSTREAM.
FREE = ("refine", "detector", "diffusion", "evaluate", "device", "tf32")
UPSTREAM = ("data", "net", "trust", "seed", "device", "tf32")


def config_of(folder: Path) -> Config:
    """Returns the config for refining the run in `folder`. Raises UserError if it has none or small images."""
    config = stored_config(folder)
    if config is None:
        raise UserError("RUN", folder, "is not a run folder: config.json is missing; give the folder of a run")
    if config.match.factor > 1:
        remedy = f"its images are stored small (match.factor={config.match.factor}), and refinement needs full ones"
        raise UserError("RUN", folder, f"{remedy}; distil with --set match.factor=1")
    experts = config.experts.model_copy(update={"path": None})  # refinement needs no experts
    refine = config.refine.model_copy(update={"start": str(folder.resolve())})
    return config.model_copy(update={"synthesis": "generative", "experts": experts, "refine": refine})


def refuse_change(before: Config, now: Config) -> None:
    """Raises UserError if `now` changes the data, the labels or the images per class of the other run."""
    old, new = (flatten_sections(config.model_dump(mode="json")) for config in (before, now))
    for name, value in new.items():
        if name.partition(".")[0] not in FREE and value != old[name]:
            remedy = f"the run to refine used {old[name]}; only {', '.join(FREE)} may differ"
            raise UserError(name, value, remedy)


def starting_trust(folder: Path, train: Dataset) -> TrustState:
    """Returns the run's trusted view. Raises UserError if it has none yet, or if its labels differ from the data's."""
    file = folder / "trust.safetensors"
    if not file.exists():
        remedy = (
            "has no trust.safetensors: it ended before the stage trust; continue it with tadperf distill --resume --out"
        )
        raise UserError("RUN", folder, f"{remedy} {folder}")
    state = TrustState.load(file)
    if state.class_names != train.class_names or not state.given.equal(train.labels):
        raise UserError("RUN", folder, "its labels differ from the labels of the data; distil the data again")
    return state


def starting_images(folder: Path, task: Task) -> DistilledSet | None:
    """Returns the run's synthetic set, or None if it has none yet. Raises UserError if it belongs to other data."""
    file = folder / "distilled.safetensors"
    if not file.exists():
        return None
    distilled = artifact.load(file)
    if distilled.class_names != task.train.class_names or distilled.data.get("fingerprint") != task.train.fingerprint:
        raise UserError("RUN", folder, "its synthetic images were distilled from other data; distil the data again")
    assert len(distilled.images) == task.train.num_classes * task.config.match.ipc
    return distilled


def borrow_models(folder: Path, config: Config, run: Run) -> None:
    """Copies the other run's detector and diffusion model into `run`, each if its section of the config is the same."""
    other = stored_config(folder)
    assert other is not None
    detector, diffusion = folder / "detector.safetensors", folder / "diffusion"
    if other.detector == config.detector and detector.exists() and not (run.path / detector.name).exists():
        files.write_bytes(run.path / detector.name, detector.read_bytes())
    if other.diffusion == config.diffusion:
        copy_folder(diffusion, run.path / diffusion.name)


def copy_folder(source: Path, target: Path) -> None:
    """Copies a folder completely or not at all. Does nothing if the source is missing or the target exists."""
    if source.is_dir() and not target.exists():
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        partial.rename(target)


def inherit(folder: Path, task: Task, run: Run) -> None:
    """Copies the rounds of trust, the detector and the diffusion model of the finished run in `folder` (tadperf).

    Does nothing if the config or the data differ, because `task` would train other ones.
    """
    other, now = stored_config(folder), task.config
    if other is None or not (folder / "DONE").exists():
        return
    same = all(getattr(other, name) == getattr(now, name) for name in UPSTREAM)
    result = json.loads((folder / "result.json").read_bytes())
    if not same or other.refine.start != now.refine.start or result["data"]["fingerprint"] != task.train.fingerprint:
        return
    copy_folder(folder / "trust", run.path / "trust")
    if now.synthesis != "matching":
        borrow_models(folder, now, run)
