"""One job over a grid of config fields: a run folder for each combination, one table, CSV and plot for all."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tadperf import files
from tadperf.config import Config
from tadperf.config.schema import flatten_sections
from tadperf.errors import UserError
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.prepare import prepare
from tadperf.progress import Progress, silent
from tadperf.refine import start
from tadperf.report.curves import save_curves
from tadperf.run.folder import Run, finished_result, stored_config
from tadperf.task.task import shared_experts_folder

NOTE = "sweep.json"  # what a sweep's folder is a sweep of
EXAMPLE = "such as match.ipc=1,10"
SWEEP_BASELINES = ("initial", "random_real", "full_data")


class Cell(NamedTuple):
    """One combination of a sweep."""

    values: dict[str, Any]  # of the fields that are swept, as the config has them
    folder: str
    config: Config


def parse_axes(texts: Sequence[str]) -> dict[str, list[str]]:
    """ "refine.beta=0,.5" each -> field to values as text; commas within brackets or quotes part nothing.

    Raises UserError on anything else, and on a field that is named twice.
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        field, equals, values = (part.strip() for part in text.partition("="))
        if not (field and equals):
            raise UserError("FIELD=LIST", text, f"must be section.key=value,value,..., {EXAMPLE}")
        if field in axes:
            raise UserError(field, values, "is named twice; put all its values into one list")
        parts = _split(values)
        if not all(parts):
            raise UserError(field, values or '""', f"must be a list of values without a gap, {EXAMPLE}")
        axes[field] = parts
    if not axes:
        raise UserError("FIELD=LIST", '""', f"name a field and the values it is to take, {EXAMPLE}")
    return axes


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += letter
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
    return [part.strip() for part in parts]


def sweep_cells(axes: Mapping[str, Sequence[str]], config_of: Callable[[list[str]], Config]) -> list[Cell]:
    """Every combination of the values, the last field's changing fastest.

    config_of: the config for "section.key=value" texts. Raises UserError where a value comes twice.
    """
    made: list[Cell] = []
    for values in itertools.product(*axes.values()):
        config = config_of([f"{field}={value}" for field, value in zip(axes, values, strict=True)])
        known = flatten_sections(config.model_dump(mode="json"))
        chosen = {field: known[field] for field in axes}
        if any(cell.values == chosen for cell in made):
            raise UserError(", ".join(axes), ", ".join(values), "comes twice; name every value once")
        name = ",".join(f"{field}={_slug(value)}" for field, value in chosen.items())
        same = sum(cell.folder.partition("~")[0] == name for cell in made)
        made.append(Cell(chosen, f"{name}~{same + 1}" if same else name, config))
    return made


def _slug(value: Any) -> str:
    """A value as a part of a file's name."""
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")[:60]


def stored_cells(out: Path) -> list[Cell]:
    """The cells of the sweep in `out`. Raises UserError where there is none."""
    if not out.is_dir():
        raise UserError("--resume", out, "there is no such folder; leave out --resume to start it")
    if not (out / NOTE).exists():
        raise UserError("--resume", out, f"is not the folder of a sweep: there is no {NOTE} in it; check --out")
    noted = json.loads((out / NOTE).read_bytes())
    return [Cell(c["values"], c["folder"], Config.model_validate(c["config"])) for c in noted["cells"]]


def check_cells(chosen: Sequence[Cell], out: Path) -> None:
    """Raises UserError on what can be known to be wrong with any cell before hours of others."""
    for cell in chosen:
        if _finished(out / cell.folder, cell.config) is None:
            prepare(cell.config)


def run_sweep(chosen: Sequence[Cell], out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Runs every cell in its folder of `out`; a finished run is read, a killed one goes on (tadperf).

    A run takes the experts of an earlier one where it would train the very same, and so the rounds of trust, the
    detector and the diffusion model. Leaves sweep.csv and sweep.png in `out`; returns the fields, rows, one for each
    cell and network, and paths. Raises UserError on a wrong value.
    """
    out.mkdir(parents=True, exist_ok=True)
    noted = [cell._asdict() | {"config": cell.config.model_dump(mode="json")} for cell in chosen]
    files.write_json(out / NOTE, {"cells": noted})
    rows: list[dict[str, Any]] = []
    for cell in chosen:
        result = _run(cell, [out / other.folder for other in chosen], out, progress)
        rows += _rows(cell, result)
    paths = {"sweep": out, "csv": out / "sweep.csv", "plot": out / "sweep.png"}
    files.write_bytes(paths["csv"], _table(rows).encode())
    save_curves(paths["plot"], list(chosen[0].values), rows)
    return {"fields": list(chosen[0].values), "rows": rows, "paths": {name: str(path) for name, path in paths.items()}}


def _finished(place: Path, config: Config) -> dict[str, Any] | None:
    return finished_result(place, _as_started(place, config)) if place.exists() else None


def _as_started(place: Path, config: Config) -> Config:
    """`config` with the place of the experts that a run already there has taken."""
    before = stored_config(place)
    return _with_experts(config, before.experts.path if before and not config.experts.path else config.experts.path)


def _with_experts(config: Config, path: str | None) -> Config:
    return config.model_copy(update={"experts": config.experts.model_copy(update={"path": path})})


def _run(cell: Cell, others: Sequence[Path], out: Path, progress: Progress) -> dict[str, Any]:
    pass

    place = out / cell.folder
    if (result := _finished(place, cell.config)) is not None:
        return result

    def named(stage: str, done: int, total: int, **values: object) -> None:
        progress(f"{cell.folder}: {stage}", done, total, **values)

    task = prepare(cell.config)
    if place.exists() and stored_config(place) is not None:
        task = replace(task, config=_as_started(place, cell.config))
    elif not cell.config.experts.path:
        for other in others:
            if (other / "DONE").exists() and (other / "experts").is_dir():
                same = replace(task, config=_with_experts(task.config, str(other.resolve())))
                try:
                    shared_experts_folder(same)
                except UserError:
                    continue
                task = same
                break
    with Run.create(place, task.config, place.exists()) as run:
        for other in others:
            start.inherit(other, task, run)
        return distill_task(task, run, named)


def _rows(cell: Cell, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracies in [0, 1], mean and deviation; baselines where the run has them; seconds."""
    known = {name: result["baselines"][name]["mean"] for name in SWEEP_BASELINES if name in result["baselines"]}
    return [
        {
            **cell.values,
            "network": network,
            "accuracy": scores["mean"],
            "std": scores["std"],
            "runs": len(scores["runs"]),
            **known,
            "seconds": result["seconds"],
            "folder": cell.folder,
        }
        for network, scores in result["accuracy"].items()
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV; a list, and what is not there, as JSON has it."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = (row.get(name, "") for name in columns)
        writer.writerow([c if isinstance(c, (str, int, float)) else json.dumps(c) for c in cells])
    return text.getvalue()
