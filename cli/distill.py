"""`tadperf distill`: the whole job, from images and labels to one distilled file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tadperf.cli import common

if TYPE_CHECKING:
    from tadperf.config import Config

Experts = Annotated[
    common.Folder,
    typer.Option("--experts", metavar="DIR", help="Use the experts of another run instead of training some."),
]

Compare = Annotated[bool, typer.Option("--compare", help="Also distil with trust off and with the oracle.")]


def distill(
    data: common.Data = None,
    ipc: common.Ipc = None,
    noise: common.Noise = None,
    labels: common.Labels = None,
    seed: common.Seed = None,
    device: common.Device = None,
    devices: common.Devices = None,
    method: common.Method = None,
    synthesis: common.Synthesis = None,
    trust: common.Trust = None,
    compare: Compare = False,
    compile: common.Compile = None,
    experts: Experts = None,
    repeats: common.Repeats = None,
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
    """Distil DATA into a few synthetic images per class, and measure what they are worth."""
    options = common.fields(
        data=data,
        ipc=ipc,
        noise=noise,
        labels=labels,
        seed=seed,
        device=device,
        method=method,
        trust=trust,
        synthesis=synthesis,
        repeats=repeats,
        image_size=image_size,
        format=format,
        experts=experts and str(experts.resolve()),
        compile=compile,
    )
    asked = common.Asked(preset, config_file, sets or (), options, quiet)
    config, out = common.run_config(asked, out, resume, default_out)

    def run() -> tuple[dict[str, Any], dict[str, Any]]:
        return _run(asked, config, out, resume), _compare(config, out, quiet) if compare else {}

    with common.resumable("distill", out, devices):
        result, compared = common.divided(run, devices)
    if as_json:
        common.print_json(result | ({"compare": compared} if compared else {}))
    else:
        from tadperf.cli.tables import print_comparison, print_result

        print_result(result)
        if compared:
            print_comparison(compared)


def default_out(config: Config) -> Path:
    """runs/<data>-ipc<ipc>-seed<seed>."""
    return Path("runs") / f"{common.data_name(config.data.path)}-ipc{config.match.ipc}-seed{config.seed}"


def _run(asked: common.Asked, config: Config, out: Path, resume: bool) -> dict[str, Any]:
    from tadperf.pipeline.distill import distill_task
    from tadperf.pipeline.prepare import prepare
    from tadperf.run.folder import Run, finished_result

    if resume and (result := finished_result(out, config)) is not None:
        return result
    pass

    from tadperf.cli.progress import display

    with display(asked.quiet) as progress:
        task = prepare(config, progress)
        with Run.create(out, config, resume) as run:
            if not resume:
                common.state_preset(asked)
            return distill_task(task, run, progress)


def _compare(config: Config, out: Path, quiet: bool) -> dict[str, Any]:
    from tadperf.cli.progress import display
    from tadperf.pipeline.compare import compare_trust_modes

    with display(quiet) as progress:
        return compare_trust_modes(config, out, progress)
