"""Plans a sweep: its combinations, its folder, and the notes to print before it starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tadperf.config import Config
from tadperf.config.options import option_name
from tadperf.config.sources import ConfigSources
from tadperf.errors import UserError
from tadperf.pipeline.run_config import RUNS, data_name
from tadperf.pipeline.sweep import Cell, check_sweep_folder, parse_axes, stored_cells, sweep_cells
from tadperf.run.folder import check_run_folder

REFINEMENT_SECTIONS = ("refine", "detector", "diffusion")  # matching does not use them


class SweepPlan(NamedTuple):
    """The combinations of a sweep, its folder, and lines for the user."""

    cells: list[Cell]
    out: Path
    notes: list[str]


def plan_sweep(axes: Sequence[str], sources: ConfigSources, out: Path | None, resume: bool) -> SweepPlan:
    """Plans every combination of `axes` ("match.ipc=1,10" each) over the other settings.

    A resumed sweep without axes takes its combinations from its folder. A sweep of a setting that only refinement uses
    sets the synthesis to generative, unless an option sets it. Raises UserError for a wrong axis, setting or folder.
    """
    if resume and out and not axes:
        return SweepPlan(stored_cells(out), out, [])
    fields = parse_axes(axes)
    _refuse_repeated(fields, sources)
    cells, notes = _cells(fields, sources)
    if unused := _unused_field(fields, cells):
        if "synthesis" in sources.options:
            raise UserError("--synthesis", "matching", f"does not use {unused}; choose generative or hybrid")
        sources = replace(sources, options={**sources.options, "synthesis": "generative"})
        cells, notes = _cells(fields, sources)
        notes.append(f"generating images, because matching does not use {unused} (--synthesis hybrid does both)")
    name = "-".join(field.rpartition(".")[2] for field in fields)
    out = out or RUNS / f"{data_name(cells[0].config.data.path)}-sweep-{name}"
    if resume:
        check_sweep_folder(out)
    else:
        check_run_folder(out, resume)
    return SweepPlan(cells, out, notes)


def _cells(fields: Mapping[str, Sequence[str]], sources: ConfigSources) -> tuple[list[Cell], list[str]]:
    """Returns the combinations, and a line about the presets that were chosen for them."""
    presets: list[str] = []

    def config_of(sets: list[str]) -> Config:
        combined = replace(sources, sets=[*sources.sets, *sets])
        if sources.preset is None:
            presets.append(combined.preset_name())
        return combined.config()

    cells = sweep_cells(fields, config_of)
    note = f"preset {', '.join(dict.fromkeys(presets))} (--preset chooses one for all)"
    return cells, [note] if presets else []


def _unused_field(fields: Collection[str], cells: Sequence[Cell]) -> str | None:
    """Returns the first field of the sweep that none of its combinations uses, or None."""
    unused = [field for field in fields if field.partition(".")[0] in REFINEMENT_SECTIONS]
    return unused[0] if unused and all(cell.config.synthesis == "matching" for cell in cells) else None


def _refuse_repeated(fields: Mapping[str, Sequence[str]], sources: ConfigSources) -> None:
    """Raises UserError if an option sets a field of the sweep, because it would silently override the sweep."""
    for field, values in fields.items():
        if field in sources.options:
            axis = f"{field}={','.join(values)}"
            raise UserError("FIELD=LIST", axis, f"{option_name(field)} sets this field too; leave one of them out")
