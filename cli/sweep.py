"""`tadperf sweep`: the whole job for every combination of values of some config fields."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from tadperf.cli import common

if TYPE_CHECKING:
    from tadperf.pipeline.sweep import Cell

Axes = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(metavar="FIELD=LIST", help="Any config field and its values: match.ipc=1,10.", show_default=False),
]
Data = Annotated[common.Text, typer.Option("--data", metavar="DATA", help=common.DATA_HELP)]
Out = Annotated[
    common.Folder, typer.Option("--out", metavar="DIR", help="Holds the runs; by default runs/<data>-sweep-....")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on in the folder: what is finished there is only read.")]
GENERATIVE = ("refine", "detector", "diffusion")  # sections that matching has no use for


def sweep(
    axes: Axes = None,
    data: Data = None,
    noise: common.Noise = None,
    labels: common.Labels = None,
    trust: common.Trust = None,
    seed: common.Seed = None,
    device: common.Device = None,
    synthesis: common.Synthesis = None,
    image_size: common.ImageSize = None,
    format: common.Format = None,
    preset: common.Preset = None,
    config_file: common.ConfigFile = None,
    sets: common.Sets = None,
    out: Out = None,
    resume: Resume = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Distil with every combination of the values named, each as `tadperf distill` would; compare what comes out."""
    options = common.fields(
        data=data,
        noise=noise,
        labels=labels,
        trust=trust,
        seed=seed,
        device=device,
        synthesis=synthesis,
        image_size=image_size,
        format=format,
    )
    asked = common.Asked(preset, config_file, sets or (), options, quiet)
    cells, out, notes = _asked(axes or [], asked, out, resume)
    with common.resumable("sweep", out):
        result = _run(cells, out, notes, quiet)
    if as_json:
        common.print_json(result)
    else:
        from tadperf.cli.tables import print_sweep

        print_sweep(result)


def _asked(axes: list[str], asked: common.Asked, out: Path | None, resume: bool) -> tuple[list[Cell], Path, list[str]]:
    """The cells, their folder and what to say of them; those of the folder where a sweep goes on without a field."""
    from dataclasses import replace

    from tadperf.errors import UserError
    from tadperf.pipeline.sweep import parse_axes, stored_cells, sweep_cells
    from tadperf.run.folder import check_run_folder

    if resume and out and not axes:
        return stored_cells(out), out, []
    fields = parse_axes(axes)
    _refuse_twice(fields, asked)
    presets: list[str] = []
    made = sweep_cells(fields, lambda sets: _config(asked, sets, presets))
    notes = [f"preset {', '.join(dict.fromkeys(presets))} (--preset chooses one for all)"] if presets else []
    if generative := _without_effect(fields, made):
        if "synthesis" in asked.options:
            raise UserError(
                "--synthesis", "matching", f"{generative} would change nothing; generative and hybrid use it"
            )
        asked = replace(asked, options=asked.options | {"synthesis": "generative"})
        made = sweep_cells(fields, lambda sets: _config(asked, sets, presets))
        notes.append(f"images are generated, since {generative} acts on nothing else (--synthesis hybrid matches, too)")
    name = "-".join(field.rpartition(".")[2] for field in fields)
    out = out or Path("runs") / f"{common.data_name(made[0].config.data.path)}-sweep-{name}"
    if resume:
        stored_cells(out)
    else:
        check_run_folder(out, resume)
    return made, out, notes


def _without_effect(fields: dict[str, list[str]], made: list[Cell]) -> str | None:
    """A field that is swept and that no cell would use."""
    unused = [field for field in fields if field.partition(".")[0] in GENERATIVE]
    matched = all(cell.config.synthesis == "matching" for cell in made)
    return unused[0] if matched and unused else None


def _refuse_twice(fields: dict[str, list[str]], asked: common.Asked) -> None:
    """A named option would win over the field of a sweep without a word."""
    from tadperf.config.merge import OPTIONS
    from tadperf.errors import UserError

    for field, values in fields.items():
        if field in asked.options:
            option = "--data" if field == "data.path" else OPTIONS[field]
            raise UserError(field, ",".join(values), f"is given by {option} too; leave one of them out")


def _config(asked: common.Asked, sets: list[str], presets: list[str]) -> Any:
    """The config of one combination; notes the preset it starts from where none was named."""
    from dataclasses import replace

    from tadperf.config.merge import default_preset

    asked = replace(asked, sets=[*asked.sets, *sets])
    if asked.preset is None:
        presets.append(default_preset(asked.file, asked.sets, asked.options))
    return common.merged(asked)


def _run(cells: list[Cell], out: Path, notes: list[str], quiet: bool) -> dict[str, Any]:
    from tadperf.cli.progress import display
    from tadperf.pipeline.sweep import check_cells, run_sweep

    check_cells(cells, out)
    for note in notes * (not quiet):
        common.note(note)
    with display(quiet) as progress:
        return run_sweep(cells, out, progress)
