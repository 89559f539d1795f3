"""`tadperf bench`: compares the speed of operators and stages with other implementations on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

Words = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(
        metavar="OPERATOR|STAGE", help="What to measure; by default all operators. See --list.", show_default=False
    ),
]
Text = Optional[str]  # noqa: UP045
File = Optional[Path]  # noqa: UP045
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:i.")]
Sizes = Annotated[Text, typer.Option("--sizes", metavar="LIST", help="Sizes, such as 50000x10 or cifar10.")]
Dtypes = Annotated[str, typer.Option("--dtypes", metavar="LIST", help="float32, bfloat16, float16.")]
Base = Annotated[Text, typer.Option("--base", metavar="LIST", help="Baselines: eager, inductor, peer, names, or none.")]
Threads = Annotated[Text, typer.Option("--threads", metavar="N", help="CPU threads; by default PyTorch's number.")]
Repeats = Annotated[str, typer.Option("--repeats", metavar="N", help="Number of measurements.")]
JsonFile = Annotated[File, typer.Option("--json", metavar="FILE|DIR", help="Write the rows; in DIR as <device>.json.")]
PlotFile = Annotated[File, typer.Option("--plot", metavar="FILE|DIR", help="Draw a PNG for each operator.")]
Tune = Annotated[bool, typer.Option("--tune", help="Find and save Triton launch settings for this GPU.")]
ListOnly = Annotated[bool, typer.Option("--list", help="Print what can be measured here, and exit.")]


@command("words device sizes dtypes base threads repeats json_file plot_file tune list_only --debug")
def bench(
    options: SharedOptions,
    words: Words = None,
    device: Device = "auto",
    sizes: Sizes = None,
    dtypes: Dtypes = "float32",
    base: Base = None,
    threads: Threads = None,
    repeats: Repeats = "20",
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    tune: Tune = False,
    list_only: ListOnly = False,
) -> None:
    """Measure operators and stages beside other implementations.

    For operators these are eager PyTorch, torch.compile and other libraries. For stages it is published code.
    """
    from tadperf.bench import session
    from tadperf.cli.tables import print_text

    request = session.Request(words or (), device, sizes, dtypes, base, threads, repeats, json_file, plot_file, tune)
    if list_only:
        for line in session.describe(request):
            print_text(line, indent=4)
        return
    common.note_missing_operators()
    plan = session.plan(request)
    rows = []
    for measurement in session.measure(plan, common.print_stderr):
        for line in ("", *measurement.table):
            print_text(line, indent=4)
        sys.stdout.flush()
        rows += measurement.rows
    session.save(plan, rows)
    if any(row["error"] for row in rows):
        raise typer.Exit(1)
