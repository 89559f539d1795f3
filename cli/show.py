"""`tadperf show`: writes the distilled images as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

Target = Annotated[Path, typer.Argument(metavar="FILE|RUN", help="A distilled file, or the folder of its run.")]
Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", metavar="FILE", help="The PNG file; by default next to the distilled file."),
]


@command("target out --json --debug")
def show(options: SharedOptions, target: Target, out: Out = None) -> None:
    """Write the images of FILE as a PNG, with a row for each class."""
    from tadperf.artifact import load
    from tadperf.errors import UserError
    from tadperf.report.grid import save_grid

    distilled = load(common.distilled_file(target))
    out = out or (target / "grid.png" if target.is_dir() else target.with_suffix(".png"))
    try:
        save_grid(out, distilled)
    except OSError as error:
        raise UserError("--out", out, f"cannot be written: {error.strerror}; choose another file") from None
    facts = {"file": str(target), "grid": str(out), "classes": distilled.num_classes, "ipc": distilled.ipc}
    report = target / "report.html"
    if report.is_file():
        facts["report"] = str(report)
    if options.as_json:
        common.print_json(facts)
    else:
        print(out)
        if "report" in facts:
            common.print_note(f"the page with all results of this run: {report}")
