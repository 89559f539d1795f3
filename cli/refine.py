"""`tadperf refine`: generates images, or takes those of a run, and replaces the images that a detector rejects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

if TYPE_CHECKING:
    from tadperf.config import Config

RunOrData = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(
        metavar="RUN|DATA",
        help="A run folder, to refine its images; or data as for distill, to generate images for it.",
        show_default=False,
    ),
]
Evaluate = Annotated[bool, typer.Option("--evaluate", help="Also train networks on the images, as distill does.")]


@command(
    "run_or_data --ipc --noise --labels --seed --device --devices --trust --batch --backend evaluate --image-size "
    "--skip-broken --format --preset --config --set --out --resume --json --quiet --debug"
)
def refine(options: SharedOptions, run_or_data: RunOrData = None, evaluate: Evaluate = False) -> None:
    """Generate or refine images with a diffusion model. It replaces those that a detector rejects.

    For DATA, this finds the trusted samples, trains the detector and the diffusion model, and generates the first
    images. For a RUN, finished or killed, it uses that run's trusted samples and images, and its detector and diffusion
    model if it has them. Then only refine.*, detector.*, diffusion.*, evaluate.* and the device may be set. Images that
    the detector accepts do not change.
    """
    from tadperf.cli.options import invocation
    from tadperf.pipeline.run_config import choose_refinement, choose_run, refine_folder

    sources = options.sources
    if run_or_data and (Path(run_or_data) / "config.json").exists():
        config, out = choose_refinement(sources, Path(run_or_data), options.out, options.resume)
    else:
        given = {**sources.options, "synthesis": "generative"}
        if run_or_data:
            given["data.path"] = run_or_data
            invocation.typed = {**(invocation.typed or {}), "data.path": "DATA"}
        options = replace(options, sources=replace(sources, options=given))
        config, out = choose_run(options.sources, options.out, options.resume, refine_folder)
    with common.resumable("refine", out, options.devices):
        result = common.run_in_ranks(lambda: _refine(options, config, out, evaluate), options.devices)
    if options.as_json:
        common.print_json(result)
    else:
        from tadperf.cli.tables import print_refined

        print_refined(result)


def _refine(options: SharedOptions, config: Config, out: Path, evaluate: bool) -> dict[str, Any]:
    from tadperf.cli.progress import display
    from tadperf.pipeline.distill import distill_task
    from tadperf.pipeline.prepare import prepare
    from tadperf.run.folder import Run, finished_result

    if options.resume and (result := finished_result(out, config)) is not None:
        return result
    with display(options.quiet) as progress:
        task = prepare(config, progress)
        with Run.create(out, config, options.resume) as run:
            if not options.resume and not config.refine.start:
                common.print_preset(options.sources, options.quiet)
            return distill_task(task, run, progress, evaluate=evaluate)
