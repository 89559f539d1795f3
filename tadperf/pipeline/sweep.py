"""Runs one task over a grid of config fields: a run folder for each combination, and one table and plot for all."""

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
from tadperf.report.drawing import save_safely
from tadperf.run.folder import Run, finished_result, read_json, stored_config
from tadperf.task.task import Task, shared_experts_folder

CELLS_FILE = "sweep.json"  # the cells of the sweep in a folder
EXAMPLE = "such as match.ipc=1,10"
SWEEP_BASELINES = ("initial", "random_real", "full_data")


class Cell(NamedTuple):
    """One combination of values in a sweep."""

    values: dict[str, Any]  # by swept field, as the config holds them
    folder: str
    config: Config


def parse_axes(texts: Sequence[str]) -> dict[str, list[str]]:
    """Reads texts such as "refine.beta=0,.5" and returns the values, as text, by field.

    Commas inside brackets or quotes do not separate values. Raises UserError for a malformed text or a repeated field.
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        field, equals, values = (part.strip() for part in text.partition("="))
        if not (field and equals):
            raise UserError("FIELD=LIST", text, f"must be section.key=value,value,..., {EXAMPLE}")
        if field in axes:
            raise UserError(field, values, "is given twice; put all values into one list")
        parts = _split(values)
        if not all(parts):
            raise UserError(field, values or '""', f"must be a list of values without empty ones, {EXAMPLE}")
        axes[field] = parts
    if not axes:
        raise UserError("FIELD=LIST", '""', f"add a field and its values, {EXAMPLE}")
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
    """Returns every combination of the values. The last field changes fastest.

    config_of: returns the config for texts such as "section.key=value". Raises UserError for a repeated value.
    """
    cells: list[Cell] = []
    for texts in itertools.product(*axes.values()):
        config = config_of([f"{field}={text}" for field, text in zip(axes, texts, strict=True)])
        fields = flatten_sections(config.model_dump(mode="json"))
        values = {field: fields[field] for field in axes}
        if any(cell.values == values for cell in cells):
            raise UserError(", ".join(axes), ", ".join(texts), "is given twice; give every value once")
        name = ",".join(f"{field}={_file_name(value)}" for field, value in values.items())
        same_name = sum(cell.folder.partition("~")[0] == name for cell in cells)
        cells.append(Cell(values, f"{name}~{same_name + 1}" if same_name else name, config))
    return cells


def _file_name(value: Any) -> str:
    """Returns a value as a part of a file name."""
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")[:60]


def check_sweep_folder(out: Path) -> None:
    """Raises UserError if `out` is not the folder of a sweep."""
    if not out.is_dir():
        raise UserError("--resume", out, "there is no such folder; leave out --resume to start it")
    if not (out / CELLS_FILE).exists():
        raise UserError("--resume", out, f"is not the folder of a sweep: there is no {CELLS_FILE} in it; check --out")


def stored_cells(out: Path) -> list[Cell]:
    """Returns the cells of the sweep in `out`. Raises UserError if there is no sweep, or if its file is damaged."""
    check_sweep_folder(out)
    file, remedy = out / CELLS_FILE, "give the fields and values again, with --resume; finished runs are not repeated"
    stored = read_json(file, remedy)
    try:
        cells = [
            Cell(dict(cell["values"]), str(cell["folder"]), Config.model_validate(cell["config"]))
            for cell in stored["cells"]
        ]
    except (KeyError, TypeError, ValueError):
        cells = []
    if not cells:
        raise UserError("--resume", file, f"is damaged; {remedy}")
    return cells


def check_cells(cells: Sequence[Cell], out: Path, progress: Progress = silent) -> None:
    """Checks the config and the data of every cell that is not finished. Raises UserError if one is wrong."""
    for cell in cells:
        if _finished(out / cell.folder, cell.config) is None:
            prepare(cell.config, progress)


def run_sweep(cells: Sequence[Cell], out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Runs every cell in its own folder of `out`. Reads finished runs and resumes killed ones (tadperf).

    A run takes the experts, the rounds of trust, the detector and the diffusion model from another cell if it would
    train the same ones. Writes sweep.csv and sweep.png into `out`. Returns the fields, the rows (one for each cell and
    network) and the paths. Raises UserError on a wrong value.
    """
    out.mkdir(parents=True, exist_ok=True)
    stored = [cell._asdict() | {"config": cell.config.model_dump(mode="json")} for cell in cells]
    files.write_json(out / CELLS_FILE, {"cells": stored})
    folders = [out / cell.folder for cell in cells]
    rows: list[dict[str, Any]] = []
    for cell in cells:
        rows += _rows(cell, _run_cell(cell, folders, out, progress))
    fields = list(cells[0].values)
    paths = {"sweep": out, "csv": out / "sweep.csv", "plot": out / "sweep.png"}
    files.write_bytes(paths["csv"], _csv(rows).encode())
    save_safely(save_curves, paths["plot"], fields, rows)
    return {"fields": fields, "rows": rows, "paths": {name: str(path) for name, path in paths.items()}}


def _finished(folder: Path, config: Config) -> dict[str, Any] | None:
    return finished_result(folder, _stored_form(folder, config)) if folder.exists() else None


def _stored_form(folder: Path, config: Config) -> Config:
    """Returns `config`; if it has no experts.path, with that of the run in `folder`."""
    stored = stored_config(folder)
    return _with_experts(config, stored.experts.path if stored and not config.experts.path else config.experts.path)


def _with_experts(config: Config, path: str | None) -> Config:
    return config.model_copy(update={"experts": config.experts.model_copy(update={"path": path})})


def _run_cell(cell: Cell, folders: Sequence[Path], out: Path, progress: Progress) -> dict[str, Any]:
    """Runs a cell, if it is not finished, and returns its result. folders: those of all cells of the sweep."""
    folder = out / cell.folder
    if (result := _finished(folder, cell.config)) is not None:
        return result

    def report(stage: str, done: int, total: int, **values: object) -> None:
        progress(f"{cell.folder}: {stage}", done, total, **values)

    task = prepare(cell.config, report)
    if folder.exists() and stored_config(folder) is not None:
        task = replace(task, config=_stored_form(folder, cell.config))
    elif not cell.config.experts.path:
        task = _share_experts(task, folders)
    with Run.create(folder, task.config, folder.exists()) as run:
        for other in folders:
            start.inherit(other, task, run)
        return distill_task(task, run, report)


def _share_experts(task: Task, folders: Sequence[Path]) -> Task:
    """Returns the task with the experts of the first finished run that fit it, or the task itself."""
    for folder in folders:
        if (folder / "DONE").exists() and (folder / "experts").is_dir():
            sharing = replace(task, config=_with_experts(task.config, str(folder.resolve())))
            try:
                shared_experts_folder(sharing)
            except UserError:
                continue
            return sharing
    return task


def _rows(cell: Cell, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for each network: accuracies in [0, 1] as mean and deviation, baselines if known, seconds."""
    baselines = {name: result["baselines"][name]["mean"] for name in SWEEP_BASELINES if name in result["baselines"]}
    return [
        {
            **cell.values,
            "network": network,
            "accuracy": scores["mean"],
            "std": scores["std"],
            "runs": len(scores["runs"]),
            **baselines,
            "seconds": result["seconds"],
            "folder": cell.folder,
        }
        for network, scores in result["accuracy"].items()
    ]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows as CSV. Lists and None are written as JSON."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = (row.get(name, "") for name in columns)
        writer.writerow([v if isinstance(v, (str, int, float)) else json.dumps(v) for v in values])
    return text.getvalue()
