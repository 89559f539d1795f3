"""Chooses the config and the folder of a run from the sources of its settings."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tadperf.config import Config
from tadperf.config.sources import ConfigSources
from tadperf.errors import UserError
from tadperf.refine import start
from tadperf.run.folder import check_run_folder, stored_config

RUNS = Path("runs")  # the parent of the default run folders


def data_name(path: str) -> str:
    """Returns a short name for the data: "digits", or the name of the file or folder without its suffixes."""
    name = re.sub(r"[*?{}\[\]:]+", "-", Path(path).resolve().name).strip("-")
    return name.split(".")[0] or name.strip(".") or "data"


def distill_folder(config: Config) -> Path:
    """Returns runs/<data>-ipc<ipc>-seed<seed>."""
    return RUNS / f"{data_name(config.data.path)}-ipc{config.match.ipc}-seed{config.seed}"


def experts_folder(config: Config) -> Path:
    """Returns runs/<data>-experts-seed<seed>."""
    return RUNS / f"{data_name(config.data.path)}-experts-seed{config.seed}"


def refine_folder(config: Config) -> Path:
    """Returns runs/<data>-refined-ipc<ipc>-seed<seed>, or runs/<run>-refined for the images of another run."""
    if config.refine.start:
        return RUNS / f"{Path(config.refine.start).name}-refined"
    return RUNS / f"{data_name(config.data.path)}-refined-ipc{config.match.ipc}-seed{config.seed}"


def choose_run(
    sources: ConfigSources, out: Path | None, resume: bool, default_folder: Callable[[Config], Path]
) -> tuple[Config, Path]:
    """Returns the config and the folder of a run. A resumed run keeps its own settings unless a source changes them.

    Raises UserError for a wrong setting, or if the folder cannot be created (with `resume`: cannot be resumed).
    """
    if resume and out:
        check_run_folder(out, resume)
        return sources.config(stored_config(out)), out
    config = sources.config()
    out = out or default_folder(config)
    check_run_folder(out, resume)
    return (sources.config(stored_config(out)) if resume else config), out


def choose_refinement(sources: ConfigSources, run: Path, out: Path | None, resume: bool) -> tuple[Config, Path]:
    """Returns the config and the folder for refining the images of another run.

    Raises UserError if a source changes the data, the labels or the images per class of that run.
    """
    if sources.preset:
        raise UserError("--preset", sources.preset, f"is for new runs; this one takes its config from {run}")
    base = start.config_of(run)
    config = sources.config(base)
    start.refuse_change(base, config)
    out = out or refine_folder(config)
    check_run_folder(out, resume)
    return config, out
