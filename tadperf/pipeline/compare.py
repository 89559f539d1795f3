"""Runs a finished task again under other trust modes, to show how much trust gains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tadperf.compute import ranks
from tadperf.config import Config
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.prepare import prepare
from tadperf.progress import Progress, silent
from tadperf.run.folder import Run, finished_result
from tadperf.task.samples import NormalisedData, normalise_data
from tadperf.task.task import Task

MODES = ("on", "off", "oracle")
UNCHANGED = ("full_data", "random_given")  # baselines that no mode changes


def compare_trust_modes(config: Config, out: Path, progress: Progress = silent) -> dict[str, dict[str, Any]]:
    """Returns the results by trust mode: of the finished run in `out`, and of its siblings in out/compare/<mode>.

    Runs missing siblings and resumes killed ones. They share the normalised data and the scores of the baselines
    full_data and random_given, which no mode changes. Leaves out the oracle if the data have no clean labels. Raises
    ValueError if the run in `out` is not finished.
    """
    main = ranks.once(lambda: finished_result(out, config))
    if main is None:
        raise ValueError(f"out: {out}: the run is not finished; finish it with distill before comparing trust modes")
    results, task, data = {config.trust.mode: main}, None, None
    for mode in MODES:
        if mode in results:
            continue
        mode_config = config.model_copy(update={"trust": config.trust.model_copy(update={"mode": mode})})
        folder = out / "compare" / mode
        result = _finished_sibling(folder, mode_config)
        if result is None:
            task = task or prepare(config, progress)
            if mode == "oracle" and task.train.clean_labels is None:
                continue
            data = data or normalise_data(task)
            result = _run_sibling(replace(task, config=mode_config), data, folder, main, progress)
        results[mode] = result
    return {mode: results[mode] for mode in MODES if mode in results}


def _finished_sibling(folder: Path, config: Config) -> dict[str, Any] | None:
    return ranks.once(lambda: finished_result(folder, config) if folder.exists() else None)


def _run_sibling(
    task: Task, data: NormalisedData, folder: Path, main: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    mode = task.config.trust.mode

    def report(stage: str, done: int, total: int, **values: object) -> None:
        progress(f"{stage}, trust {mode}", done, total, **values)

    known = {row: main["baselines"][row]["runs"] for row in UNCHANGED if row in main["baselines"]}
    with Run.create(folder, task.config, ranks.once(folder.exists)) as run:
        return distill_task(task, run, report, data, known)
