"""`tadperf sweep`: runs the complete job for every combination of values of some settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

if TYPE_CHECKING:
    from tadperf.pipeline.sweep_plan import SweepPlan

Axes = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(metavar="FIELD=LIST", help="Any setting and its values: match.ipc=1,10.", show_default=False),
]
Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", metavar="DIR", help="Folder of the runs; by default runs/<data>-sweep-...."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the sweep in the folder; finished runs are reused.")]


@command(
    "axes --data --noise --labels --trust --seed --device --synthesis --image-size --skip-broken --format "
    "--preset --config --set out resume --json --quiet --debug"
)
def sweep(options: SharedOptions, axes: Axes = None, out: Out = None, resume: Resume = False) -> None:
    """Distil once for every combination of values. Then compare the results."""
    from tadperf.pipeline.sweep_plan import plan_sweep

    plan = plan_sweep(axes or [], options.sources, out, resume)
    with common.resumable("sweep", plan.out):
        result = _sweep(plan, options.quiet)
    if options.as_json:
        common.print_json(result)
    else:
        from tadperf.cli.tables import print_sweep

        print_sweep(result)


def _sweep(plan: SweepPlan, quiet: bool) -> dict[str, Any]:
    from tadperf.cli.progress import display
    from tadperf.pipeline.sweep import check_cells, run_sweep

    with display(quiet) as progress:
        check_cells(plan.cells, plan.out, progress)
    if not quiet:
        for note in plan.notes:
            common.print_note(note)
    with display(quiet) as progress:
        return run_sweep(plan.cells, plan.out, progress)
