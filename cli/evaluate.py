"""`tadperf evaluate`: measures the test accuracy of a distilled file. Needs only the file and the test data.

With --protocol it also needs the run folder and the training data.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

if TYPE_CHECKING:
    from tadperf.pipeline.verify import Comparison, Stored

File = Annotated[Path, typer.Argument(metavar="FILE", help="A distilled file, or the folder of its run.")]
PROTOCOL_HELP = (
    "Compare FILE with random images and coresets of its run's trusted images. hard: class labels; soft: labels of one "
    "teacher; published: labels and learning rate of FILE; rd3: the training of RD3."
)
# Optional[...] and not `| None`: typer evaluates these types on Python 3.10 too.
Protocol = Annotated[Optional[str], typer.Option("--protocol", metavar="NAME", help=PROTOCOL_HELP)]  # noqa: UP045


Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Compare with the accuracy in result.json beside FILE or of import --accuracy; exit code 1 if it differs.",
    ),
]


@command("file DATA protocol verify --network --optimizer --repeats --seed --device --devices --json --quiet --debug")
def evaluate(options: SharedOptions, file: File, protocol: Protocol = None, verify: Verify = False) -> None:
    """Train new networks on FILE and test them on DATA. By default, DATA is what FILE was distilled from."""
    from tadperf.cli.progress import display
    from tadperf.pipeline.evaluate import evaluate_file, evaluate_protocol

    given = options.sources.options
    settings = options.sources.config()
    stored = _stored_accuracy(file, protocol) if verify else None

    def run() -> dict[str, Any]:
        with display(options.quiet) as progress:
            measure = evaluate_file if protocol is None else partial(evaluate_protocol, protocol=protocol)
            return measure(
                common.distilled_file(file),
                data=given.get("data.path"),
                networks=settings.evaluate.networks if "evaluate.networks" in given else None,
                repeats=settings.evaluate.repeats if "evaluate.repeats" in given else None,
                optimizer=settings.evaluate.optimizer if "evaluate.optimizer" in given else None,
                seed=settings.seed,
                device=settings.device,
                progress=progress,
            )

    result = common.run_in_ranks(run, options.devices)
    comparisons = _compare(stored, result)
    if options.as_json:
        common.print_json(result)
    else:
        from tadperf.cli.tables import print_accuracy, print_protocol

        (print_accuracy if protocol is None else print_protocol)(result)
        for name, found in comparisons.items():
            verdict = "agrees" if found.agrees else "differs"
            figures = f"{100 * found.measured:.1f} % measured, {100 * found.stored:.1f} % stored"
            print(f"{name} {verdict}: {figures} (up to {100 * found.allowed:.1f} points agree)")
    if not all(found.agrees for found in comparisons.values()):
        raise typer.Exit(1)


def _stored_accuracy(file: Path, protocol: str | None) -> Mapping[str, Stored]:
    """Reads the stored accuracy before minutes of training."""
    from tadperf.errors import UserError
    from tadperf.pipeline.verify import stored_accuracy

    if protocol is not None:
        raise UserError(
            "--verify", f"--protocol {protocol}", "trains other students than the stored ones; use one of them"
        )
    return stored_accuracy(common.distilled_file(file))


def _compare(stored: Mapping[str, Stored] | None, result: dict[str, Any]) -> dict[str, Comparison]:
    """Returns the comparisons with the stored accuracy, if there is one, and adds them to the result."""
    from tadperf.pipeline.verify import verify

    comparisons = {} if stored is None else verify(stored, result["accuracy"])
    if stored is not None:
        result["verify"] = {name: found._asdict() for name, found in comparisons.items()}
    return comparisons
