"""`tadperf.distill` and `tadperf.audit` run complete jobs from Python."""

from __future__ import annotations

from pathlib import Path

from tadperf import artifact
from tadperf.artifact import DistilledSet
from tadperf.config import Config
from tadperf.config.merge import merge
from tadperf.config.options import python_names
from tadperf.config.presets import DIGITS_NOISE
from tadperf.data.noise import add_noise
from tadperf.data.objects import object_name
from tadperf.data.open import open_config
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.prepare import prepare
from tadperf.pipeline.run_config import distill_folder
from tadperf.progress import Progress, silent
from tadperf.run.folder import Run, finished_result
from tadperf.trust.audit import audit as audit_labels
from tadperf.trust.state import TrustState


@python_names()
def distill(
    config: Config | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    progress: Progress = silent,
    data: object = None,
) -> DistilledSet:
    """Runs all stages in the folder `out` and returns the distilled set. The figures are in out/result.json.

    out: by default runs/<data>-ipc<ipc>-seed<seed>.

    `tadperf.config.merge.merge(preset, options={"match.ipc": 1})` makes a config from a preset. With `resume` a
    killed run continues and a finished run is read. data: replaces the data of the config; a path, or a Python object
    that `tadperf.open_data` opens. Without a config, the preset is `quick`, or for the digits `digits`.
    Raises UserError if anything in the config or the data is wrong.
    """
    config, given = _with_data(config, data)
    out = out or distill_folder(config)
    if not (resume and finished_result(out, config)):
        task = prepare(config, progress, given)
        with Run.create(out, config, resume) as run:
            distill_task(task, run, progress)
    return artifact.load(Path(out) / "distilled.safetensors")


@python_names()
def audit(data: object = None, config: Config | None = None, progress: Progress = silent) -> TrustState:
    """Finds the wrong labels of a training split: the verdict, score and suggested label of every sample.

    data, config: as for `distill`. `TrustState.export` writes the list.
    """
    config, given = _with_data(config, data)
    train, _ = open_config(config.data, progress, given=given)
    return audit_labels(add_noise(train, config.data.noise, config.seed), config, progress)


def _with_data(config: Config | None, data: object) -> tuple[Config, object]:
    """Returns the config with its data replaced, and the Python object to open instead of a path, if there is one."""
    if data is None:
        return config or merge(), None
    is_path = isinstance(data, (str, Path))
    path = str(data) if is_path else object_name(data)
    config = config or merge(options={"data.path": path})
    values = {"path": path}
    if path != "digits" and (config.data.path, config.data.noise) == ("digits", DIGITS_NOISE):
        values["noise"] = "none"  # the noise of the built-in digits is not meant for other data
    return config.model_copy(update={"data": config.data.model_copy(update=values)}), None if is_path else data
