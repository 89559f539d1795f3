"""`tadperf distill`: runs the complete job, from images and labels to one distilled file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

if TYPE_CHECKING:
    from tadperf.config import Config

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything, print settings, images per class, stages and folder, and end. Writes nothing, and "
        "measures nothing, unlike --estimate.",
    ),
]
Compare = Annotated[bool, typer.Option("--compare", help="Also distil with trust off and with the oracle.")]


@command(
    "DATA --ipc --noise --labels --seed --device --devices --method --synthesis --trust --features --probs --encoder "
    "compare --compile --experts --repeats --image-size --skip-broken --format --preset --config --set --out --resume "
    "dry_run --estimate --json --quiet --debug"
)
def distill(options: SharedOptions, compare: Compare = False, dry_run: DryRun = False) -> None:
    """Distil DATA into a few synthetic images per class. Then measure how well they train networks."""
    from tadperf.pipeline.run_config import choose_run, distill_folder

    if options.estimate and not dry_run:
        from tadperf.cli.estimate import show_estimate

        show_estimate(options, options.sources.config())
        return
    config, out = choose_run(options.sources, options.out, options.resume, distill_folder)
    if dry_run:
        from tadperf.cli.dry_run import show_dry_run

        show_dry_run(options, config, out, compare)
        return

    def run() -> tuple[dict[str, Any], dict[str, Any]]:
        return _distill(options, config, out), _compare(config, out, options.quiet) if compare else {}

    with common.resumable("distill", out, options.devices):
        result, comparison = common.run_in_ranks(run, options.devices)
    if options.as_json:
        common.print_json(result | ({"compare": comparison} if comparison else {}))
    else:
        from tadperf.cli.tables import print_comparison, print_result

        print_result(result)
        if comparison:
            print_comparison(comparison)


def _distill(options: SharedOptions, config: Config, out: Path) -> dict[str, Any]:
    from tadperf.cli.progress import display
    from tadperf.pipeline.distill import distill_task
    from tadperf.pipeline.prepare import prepare
    from tadperf.run.folder import Run, finished_result

    if options.resume and (result := finished_result(out, config)) is not None:
        return result
    with display(options.quiet) as progress:
        task = prepare(config, progress)
        with Run.create(out, config, options.resume) as run:
            if not options.resume:
                common.print_preset(options.sources, options.quiet)
            return distill_task(task, run, progress)


def _compare(config: Config, out: Path, quiet: bool) -> dict[str, Any]:
    from tadperf.cli.progress import display
    from tadperf.pipeline.compare import compare_trust_modes

    with display(quiet) as progress:
        return compare_trust_modes(config, out, progress)
