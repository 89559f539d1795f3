"""`tadperf refine`: images from a diffusion model, or those of another run, judged by a detector and made again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tadperf.cli import common

if TYPE_CHECKING:
    from tadperf.config import Config

WHAT_HELP = "A run's folder, whose images are refined; or images as for distill, and then all of them are made"

What = Annotated[common.Text, typer.Argument(metavar="RUN|DATA", help=WHAT_HELP, show_default=False)]
Batch = Annotated[
    common.Text, typer.Option("--batch", metavar="N", help="Images generated at a time; bounds the memory.")
]
Backend = Annotated[
    common.Text,
    typer.Option("--backend", metavar="NAME", help="auto, eager, inductor, cudagraphs or tensorrt."),
]
Evaluate = Annotated[bool, typer.Option("--evaluate", help="Also train students on the images, as distill does.")]


def refine(
    what: What = None,
    ipc: common.Ipc = None,
    noise: common.Noise = None,
    labels: common.Labels = None,
    seed: common.Seed = None,
    device: common.Device = None,
    devices: common.Devices = None,
    trust: common.Trust = None,
    batch: Batch = None,
    backend: Backend = None,
    evaluate: Evaluate = False,
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
    """Make images whose labels hold: a detector judges them, a diffusion model makes the anomalous ones again.

    Of DATA: trust, detector, diffusion model, first images, refinement. Of a RUN, finished or killed: its trusted view
    and its images; those that the detector takes for their class stay as they are; its detector and diffusion model are
    used where it has them. Only refine.*, detector.*, diffusion.*, evaluate.* and the device may then be set.
    """
    other = Path(what) if what and (Path(what) / "config.json").exists() else None
    options = common.fields(
        data=None if other else what,
        ipc=ipc,
        noise=noise,
        labels=labels,
        seed=seed,
        device=device,
        trust=trust,
        batch=batch,
        backend=backend,
        image_size=image_size,
        format=format,
    )
    if other is None:
        options["synthesis"] = "generative"
    asked = common.Asked(preset, config_file, sets or (), options, quiet)
    config, out = _config(asked, other, out, resume)
    with common.resumable("refine", out, devices):
        result = common.divided(lambda: _run(asked, config, out, resume, evaluate), devices)
    if as_json:
        common.print_json(result)
    else:
        from tadperf.cli.tables import print_refined

        print_refined(result)


def default_out(config: Config) -> Path:
    """runs/<data>-refined-ipc<ipc>-seed<seed>, or runs/<run>-refined."""
    if config.refine.start:
        return Path("runs") / f"{Path(config.refine.start).name}-refined"
    return Path("runs") / f"{common.data_name(config.data.path)}-refined-ipc{config.match.ipc}-seed{config.seed}"


def _config(asked: common.Asked, other: Path | None, out: Path | None, resume: bool) -> tuple[Config, Path]:
    if other is None:
        return common.run_config(asked, out, resume, default_out)
    from tadperf.errors import UserError
    from tadperf.refine import start
    from tadperf.run.folder import check_run_folder

    if asked.preset:
        raise UserError("--preset", asked.preset, f"belongs to new runs; the config is that of the run in {other}")
    base = start.config_of(other)
    config = common.merged(asked, base)
    start.refuse_change(base, config)
    out = out or default_out(config)
    check_run_folder(out, resume)
    return config, out


def _run(asked: common.Asked, config: Config, out: Path, resume: bool, evaluate: bool) -> dict[str, Any]:
    from tadperf.pipeline.distill import distill_task
    from tadperf.pipeline.prepare import prepare
    from tadperf.run.folder import Run, finished_result

    if resume and (result := finished_result(out, config)) is not None:
        return result
    pass

    from tadperf.cli.progress import display

    task = prepare(config)
    with Run.create(out, config, resume) as run, display(asked.quiet) as progress:
        if not resume and not config.refine.start:
            common.state_preset(asked)
        return distill_task(task, run, progress, tested=evaluate)
