"""`tadperf experts`: the training trajectories alone, to be shared by several runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tadperf.cli import common

if TYPE_CHECKING:
    from tadperf.config import Config


def experts(
    data: common.Data = None,
    noise: common.Noise = None,
    labels: common.Labels = None,
    trust: common.Trust = None,
    seed: common.Seed = None,
    device: common.Device = None,
    devices: common.Devices = None,
    method: common.Method = None,
    image_size: common.ImageSize = None,
    format: common.Format = None,
    preset: common.Preset = None,
    config_file: common.ConfigFile = None,
    sets: common.Sets = None,
    out: common.Out = None,
    resume: common.Resume = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Train the experts whose trajectories `distill --experts DIR` matches."""
    options = common.fields(
        data=data,
        noise=noise,
        labels=labels,
        trust=trust,
        seed=seed,
        device=device,
        method=method,
        image_size=image_size,
        format=format,
    )
    asked = common.Asked(preset, config_file, sets or (), options, quiet)
    config, out = common.run_config(asked, out, resume, default_out)
    with common.resumable("experts", out, devices):
        result = common.divided(lambda: _run(asked, config, out, resume), devices)
    if as_json:
        common.print_json(result)
    else:
        from tadperf.cli.tables import print_figures

        print_figures(result)


def default_out(config: Config) -> Path:
    """runs/<data>-experts-seed<seed>."""
    return Path("runs") / f"{common.data_name(config.data.path)}-experts-seed{config.seed}"


def _run(asked: common.Asked, config: Config, out: Path, resume: bool) -> dict:
    from tadperf.cli.progress import display
    from tadperf.pipeline.experts import train_experts
    from tadperf.pipeline.prepare import prepare
    from tadperf.run.folder import Run

    with display(asked.quiet) as progress:
        task = prepare(config, progress)
        with Run.create(out, config, resume) as run:
            if not resume:
                common.state_preset(asked)
            return train_experts(task, run, progress)
