"""The same job under other views of its labels, beside a finished run: what trust is worth."""

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


def compare_trust_modes(config: Config, out: Path, progress: Progress = silent) -> dict[str, dict[str, Any]]:
    """Results by trust mode: of the finished run in `out`, and of its siblings in out/compare/<mode>.

    Siblings are made where they are missing and resumed where they were killed. They share the opened and normalised
    data, and the students trained on all images with the labels as given, which no mode changes. The oracle is left
    out where the data hold no clean labels.
    """
    main = ranks.once(lambda: finished_result(out, config))
    assert main is not None, "the run to compare with must be finished"
    results, task, data = {config.trust.mode: main}, None, None
    for mode in MODES:
        if mode in results:
            continue
        asked = config.model_copy(update={"trust": config.trust.model_copy(update={"mode": mode})})
        place = out / "compare" / mode
        result = ranks.once(lambda place=place, asked=asked: finished_result(place, asked) if place.exists() else None)
        if result is None:
            task = task or prepare(config)
            if mode == "oracle" and task.train.clean_labels is None:
                continue
            data = data or normalise_data(task)
            result = _sibling(replace(task, config=asked), data, place, main, progress)
        results[mode] = result
    return {mode: results[mode] for mode in MODES if mode in results}


def _sibling(task: Task, data: NormalisedData, place: Path, main: dict[str, Any], progress: Progress) -> dict[str, Any]:
    mode = task.config.trust.mode

    def named(stage: str, done: int, total: int, **values: object) -> None:
        progress(f"{stage}, trust {mode}", done, total, **values)

    known = {"full_data": main["baselines"]["full_data"]["runs"]} if "full_data" in main["baselines"] else {}
    with Run.create(place, task.config, ranks.once(place.exists)) as run:
        return distill_task(task, run, named, data, known)
