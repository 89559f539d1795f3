"""Another run as the start: its trusted view, its images, and its detector and diffusion model where they fit."""

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

# Of the config: what may differ from the other run's; what trust, detector and diffusion model depend on.
FREE = ("refine", "detector", "diffusion", "evaluate", "device", "tf32")
UPSTREAM = ("data", "net", "trust", "seed", "device", "tf32")


def config_of(folder: Path) -> Config:
    """What refining the run in `folder` starts from: its config. Raises UserError where it is no run's folder."""
    config = stored_config(folder)
    if config is None:
        raise UserError("RUN", folder, "is no run's folder: there is no config.json in it")
    experts = config.experts.model_copy(update={"path": None})  # none are needed
    refine = config.refine.model_copy(update={"start": str(folder.resolve())})
    return config.model_copy(update={"synthesis": "generative", "experts": experts, "refine": refine})


def refuse_change(before: Config, now: Config) -> None:
    """Raises UserError where `now` asks for other data, labels or images per class than the run was made with."""
    old, new = (flatten_sections(config.model_dump(mode="json")) for config in (before, now))
    for name, value in new.items():
        if name.partition(".")[0] not in FREE and value != old[name]:
            remedy = f"the run to be refined was made with {old[name]}; only {', '.join(FREE)} may differ"
            raise UserError(name, value, remedy)


def starting_trust(folder: Path, train: Dataset) -> TrustState:
    """The run's trusted view. Raises UserError where it has none yet, or one of other labels."""
    file = folder / "trust.safetensors"
    if not file.exists():
        remedy = "was killed before it knew what to trust; continue it with tadperf distill --resume --out"
        raise UserError("RUN", folder, f"{remedy} {folder}")
    state = TrustState.load(file)
    if state.class_names != train.class_names or not state.given.equal(train.labels):
        raise UserError("RUN", folder, "its trusted view is of other labels than the data have now; distil them again")
    return state


def starting_images(folder: Path, task: Task) -> DistilledSet | None:
    """The run's synthetic set; None where it was killed before it had one. Raises UserError where it does not fit."""
    file = folder / "distilled.safetensors"
    if not file.exists():
        return None
    made = artifact.load(file)
    if made.class_names != task.train.class_names or made.data.get("fingerprint") != task.train.fingerprint:
        raise UserError("RUN", folder, "its synthetic images were made from other data; distil these again")
    assert len(made.images) == task.train.num_classes * task.config.match.ipc
    return made


def borrow_models(folder: Path, config: Config, run: Run) -> None:
    """Copies the other run's detector and diffusion model into `run`, where they were trained as `config` asks."""
    other = stored_config(folder)
    assert other is not None
    detector, diffusion = folder / "detector.safetensors", folder / "diffusion"
    if other.detector == config.detector and detector.exists() and not (run.path / detector.name).exists():
        files.write_bytes(run.path / detector.name, detector.read_bytes())
    if other.diffusion == config.diffusion:
        copy_folder(diffusion, run.path / diffusion.name)


def copy_folder(source: Path, target: Path) -> None:
    """Copies a folder whole or not at all; none that is missing, and onto none that is there."""
    if source.is_dir() and not target.exists():
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        partial.rename(target)


def inherit(folder: Path, task: Task, run: Run) -> None:
    """Takes over what the finished run in `folder` learned before it made images, where `job` would learn the same.

    That is the rounds of trust, the detector and the diffusion model (tadperf).
    """
    other, now = stored_config(folder), task.config
    if other is None or not (folder / "DONE").exists():
        return
    same = all(getattr(other, name) == getattr(now, name) for name in UPSTREAM)
    told = json.loads((folder / "result.json").read_bytes())
    if not same or other.refine.start != now.refine.start or told["data"]["fingerprint"] != task.train.fingerprint:
        return
    copy_folder(folder / "trust", run.path / "trust")
    if now.synthesis != "matching":
        borrow_models(folder, now, run)
