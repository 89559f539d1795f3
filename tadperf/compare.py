"""The same job under other views of its labels, beside a finished run: what trust is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tadperf import pipeline, ranks, runs
from tadperf.config import Config
from tadperf.job import Arrays, Job, arrays, prepare
from tadperf.progress import Progress, silent
from tadperf.runs import Run

MODES = ("on", "off", "oracle")


def compare(config: Config, out: Path, progress: Progress = silent) -> dict[str, dict[str, Any]]:
    """Results by trust mode: of the finished run in `out`, and of its siblings in out/compare/<mode>.

    Siblings are made where they are missing and resumed where they were killed. They share the opened and normalised
    data, and the students trained on all images with the labels as given, which no mode changes. The oracle is left
    out where the data hold no clean labels.
    """
    main = ranks.once(lambda: runs.finished(out, config))
    assert main is not None, "the run to compare with must be finished"
    results, job, data = {config.trust.mode: main}, None, None
    for mode in MODES:
        if mode in results:
            continue
        asked = config.model_copy(update={"trust": config.trust.model_copy(update={"mode": mode})})
        place = out / "compare" / mode
        result = ranks.once(lambda place=place, asked=asked: runs.finished(place, asked) if place.exists() else None)
        if result is None:
            job = job or prepare(config)
            if mode == "oracle" and job.train.clean_labels is None:
                continue
            data = data or arrays(job)
            result = _sibling(replace(job, config=asked), data, place, main, progress)
        results[mode] = result
    return {mode: results[mode] for mode in MODES if mode in results}


def _sibling(job: Job, data: Arrays, place: Path, main: dict[str, Any], progress: Progress) -> dict[str, Any]:
    mode = job.config.trust.mode

    def named(stage: str, done: int, total: int, **values: object) -> None:
        progress(f"{stage}, trust {mode}", done, total, **values)

    known = {"full_data": main["baselines"]["full_data"]["runs"]} if "full_data" in main["baselines"] else {}
    with Run.create(place, job.config, ranks.once(place.exists)) as run:
        return pipeline.distill(job, run, named, data, known)
