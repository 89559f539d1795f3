"""`tadperf evaluate`: measures the test accuracy of a distilled file. Needs only the file and the test data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

File = Annotated[Path, typer.Argument(metavar="FILE", help="A distilled file, or the folder of its run.")]


@command("file DATA --network --repeats --seed --device --devices --json --quiet --debug")
def evaluate(options: SharedOptions, file: File) -> None:
    """Train new networks on FILE and test them on DATA; by default on the data that FILE was distilled from."""
    from tadperf.cli.progress import display
    from tadperf.pipeline.evaluate import evaluate_file

    given = options.sources.options
    settings = options.sources.config()

    def run() -> dict[str, Any]:
        with display(options.quiet) as progress:
            return evaluate_file(
                common.distilled_file(file),
                given.get("data.path"),
                networks=settings.evaluate.networks if "evaluate.networks" in given else None,
                repeats=settings.evaluate.repeats if "evaluate.repeats" in given else None,
                seed=settings.seed,
                device=settings.device,
                progress=progress,
            )

    result = common.run_in_ranks(run, options.devices)
    if options.as_json:
        common.print_json(result)
    else:
        from tadperf.cli.tables import print_accuracy

        print_accuracy(result)
