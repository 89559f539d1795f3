"""`tadperf evaluate`: measures the test accuracy of a distilled file. Needs only the file and the test data.

With --protocol it also needs the run folder and the training data.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

File = Annotated[Path, typer.Argument(metavar="FILE", help="A distilled file, or the folder of its run.")]
PROTOCOL_HELP = (
    "Compare FILE with random images and coresets of its run's trusted images. hard: class labels; soft: labels of one "
    "teacher; published: labels and learning rate of FILE; rd3: the training of RD3."
)
# Optional[...] and not `| None`: typer evaluates these types on Python 3.10 too.
Protocol = Annotated[Optional[str], typer.Option("--protocol", metavar="NAME", help=PROTOCOL_HELP)]  # noqa: UP045


@command("file DATA protocol --network --repeats --seed --device --devices --json --quiet --debug")
def evaluate(options: SharedOptions, file: File, protocol: Protocol = None) -> None:
    """Train new networks on FILE and test them on DATA; by default on the data that FILE was distilled from."""
    from tadperf.cli.progress import display
    from tadperf.pipeline.evaluate import evaluate_file, evaluate_protocol

    given = options.sources.options
    settings = options.sources.config()

    def run() -> dict[str, Any]:
        with display(options.quiet) as progress:
            measure = evaluate_file if protocol is None else partial(evaluate_protocol, protocol=protocol)
            return measure(
                common.distilled_file(file),
                data=given.get("data.path"),
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
        from tadperf.cli.tables import print_accuracy, print_protocol

        (print_accuracy if protocol is None else print_protocol)(result)
