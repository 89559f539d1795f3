"""Distilling from Python."""

from __future__ import annotations

from pathlib import Path

from tadperf import artifact, pipeline
from tadperf.artifact import DistilledSet
from tadperf.config import Config
from tadperf.progress import Progress, silent
from tadperf.runs import Run, finished


def distill(config: Config, out: Path | str, resume: bool = False, progress: Progress = silent) -> DistilledSet:
    """Runs a whole job in the folder `out` and returns its distilled set; the figures are in out/result.json.

    `tadperf.merge.merge(preset, options={"match.ipc": 1})` makes a config from a preset. With `resume` a run that was
    killed goes on, and one that is finished is only read. Raises UserError on whatever is wrong with config or data.
    """
    if not (resume and finished(out, config)):
        job = pipeline.prepare(config)
        with Run.create(out, config, resume) as run:
            pipeline.distill(job, run, progress)
    return artifact.load(Path(out) / "distilled.safetensors")
