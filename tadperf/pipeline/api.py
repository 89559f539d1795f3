"""`tadperf.distill` runs a complete job from Python."""

from __future__ import annotations

from pathlib import Path

from tadperf import artifact
from tadperf.artifact import DistilledSet
from tadperf.config import Config
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.prepare import prepare
from tadperf.progress import Progress, silent
from tadperf.run.folder import Run, finished_result


def distill(config: Config, out: Path | str, resume: bool = False, progress: Progress = silent) -> DistilledSet:
    """Runs all stages in the folder `out` and returns the distilled set. The figures are in out/result.json.

    `tadperf.config.merge.merge(preset, options={"match.ipc": 1})` makes a config from a preset. With `resume` a
    killed run continues and a finished run is read. Raises UserError if anything in the config or the data is wrong.
    """
    if not (resume and finished_result(out, config)):
        task = prepare(config, progress)
        with Run.create(out, config, resume) as run:
            distill_task(task, run, progress)
    return artifact.load(Path(out) / "distilled.safetensors")
