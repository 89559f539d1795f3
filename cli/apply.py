"""`tadperf apply`: writes a cleaned copy of a data set, from a run or a list of labels, without a new audit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

if TYPE_CHECKING:
    from collections.abc import Mapping

RunOrData = Annotated[
    str, typer.Argument(metavar="RUN|DATA", help="A run folder, or an image folder with --labels.", show_default=False)
]
Copy = Annotated[Path, typer.Argument(metavar="OUT", help="The new folder of the copy.", show_default=False)]


@command("run_or_data copy --labels --skip-broken --json --quiet --debug")
def apply(options: SharedOptions, run_or_data: RunOrData, copy: Copy) -> None:
    """Write a cleaned copy of an image folder. Wrong labels are corrected, and untrusted images are left out.

    For a RUN, its verdicts are used. For DATA, --labels names a list such as labels.csv of an audit, as it is or with
    corrections in its column label. The copy holds symbolic links, or hard links or copies where the file system has no
    symbolic links, and manifest.csv, which says what was done with each image. The data do not change. A set of another
    format gets a list of labels for --labels.
    """
    from tadperf.cli.progress import display

    with display(options.quiet) as progress:
        if (Path(run_or_data) / "config.json").exists():
            from tadperf.pipeline.repair import apply_run

            done = apply_run(Path(run_or_data), copy, progress)
        else:
            from dataclasses import replace

            from tadperf.pipeline.repair import apply_list

            given = {"data.noise": "none", **options.sources.options, "data.path": run_or_data}
            done = apply_list(replace(options.sources, options=given).config(), copy, progress)
    if options.as_json:
        common.print_json(done)
    else:
        print_applied(done)


def print_applied(done: Mapping[str, Any]) -> None:
    """Prints one line about a cleaned copy."""
    print(
        f"{done['folder']}: {done['kept']} samples keep their label, {done['relabelled']} have another one, "
        f"{done['left_out']} are left out ({done['files']})"
    )
