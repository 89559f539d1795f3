"""A sweep gives the same bytes as its runs started alone, also after a kill, and one table of its results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tadperf.config.merge import merge
from tadperf.errors import UserError
from tadperf.pipeline import sweep
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.prepare import prepare
from tadperf.pipeline.sweep import Cell, check_cells, parse_axes, run_sweep, stored_cells, sweep_cells
from tadperf.report.curves import choose_axis, save_curves
from tadperf.run.folder import Run

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {
    "data.path": "digits",
    "device": "cpu",
    "net.width": 4,
    "net.depth": 1,
    "experts.count": 2,
    "experts.epochs": 2,
    "match.ipc": 1,
    "match.iterations": 4,
    "match.check_every": 4,
    "match.steps": 2,
    "match.max_start": 1,
    "match.expert_epochs": 1,
    "match.init": "real",
    "evaluate.epochs": 2,
    "evaluate.repeats": 2,
    "evaluate.full_epochs": 1,
    "evaluate.full_repeats": 1,
    "trust.mode": "off",
}


def plan(*texts: str) -> list[Cell]:
    tiny = [f"{name}={json.dumps(value)}" for name, value in TINY.items()]
    return sweep_cells(parse_axes(texts), lambda sets: merge("digits", None, [*tiny, *sets]))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("refine.beta=0,.5,.7", ["0", ".5", ".7"]),
        ("a.b=1", ["1"]),
        ("a=x, y z ,w", ["x", "y z", "w"]),
        ("a=[1,2],[3]", ["[1,2]", "[3]"]),
        ("a='x,y',\"z,\"", ["'x,y'", '"z,"']),
        ("a.b=c=d,e", ["c=d", "e"]),
    ],
)
def test_values_are_split_at_commas_outside_brackets_and_quotes(text, values):
    assert parse_axes([text]) == {text.partition("=")[0]: values}


@pytest.mark.parametrize("text", ["a", "=1", "a=", "a=,", "a=1,", "a=,1", "a=1,,2", "a=1, ,2"])
def test_malformed_axes_are_refused(text):
    with pytest.raises(UserError):
        parse_axes([text])


def test_every_combination_has_its_own_folder():
    combinations = plan("match.lr_img=1,.5", "evaluate.networks=[\"convnet\"],['alexnet','vgg11']", "data.path=a/b,a_b")
    assert [tuple(cell.values.values()) for cell in combinations] == [
        (lr, nets, path) for lr in (1.0, 0.5) for nets in (["convnet"], ["alexnet", "vgg11"]) for path in ("a/b", "a_b")
    ]
    assert combinations[0].folder == "match.lr_img=1.0,evaluate.networks=convnet,data.path=a_b"
    assert combinations[1].folder == combinations[0].folder + "~2"
    assert len({cell.folder for cell in combinations}) == 8
    assert all(cell.config.match.lr_img == cell.values["match.lr_img"] for cell in combinations)


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of a finished sweep and its result."""
    out = tmp_path_factory.mktemp("swept") / "sweep"
    return out, run_sweep(plan("match.iterations=2,4", "match.ipc=1,2"), out)


def test_a_sweep_writes_its_runs_table_and_picture(swept, tmp_path):
    out, result = swept
    assert [(row["match.iterations"], row["match.ipc"]) for row in result["rows"]] == [(2, 1), (2, 2), (4, 1), (4, 2)]
    with open(out / "sweep.csv", newline="") as file:
        written = list(csv.DictReader(file))
    for row, line in zip(result["rows"], written, strict=True):
        assert {name: str(value) for name, value in row.items()} == line
        stored = json.loads((out / row["folder"] / "result.json").read_bytes())
        assert (row["accuracy"], row["random_real"]) == (
            stored["accuracy"]["convnet"]["mean"],
            stored["baselines"]["random_real"]["mean"],
        )
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert [cell.folder for cell in stored_cells(out)] == [row["folder"] for row in result["rows"]]
    (alone,) = plan("match.iterations=4", "match.ipc=2")
    with Run.create(tmp_path / "alone", alone.config) as run:
        distill_task(prepare(alone.config), run)
    files = [folder / "distilled.safetensors" for folder in (tmp_path / "alone", out / alone.folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_experts_are_trained_once(swept):
    out, _ = swept
    assert len(list(out.glob("*/experts"))) == 1


def test_a_finished_run_is_read_and_a_killed_one_continues(swept, tmp_path, monkeypatch):
    out, result = swept
    chosen, place = plan("match.iterations=2,4", "match.ipc=1,2"), tmp_path / "killed"

    def kill(stage: str, done: int, total: int, **values: object) -> None:
        if stage == f"{chosen[2].folder}: matching" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(chosen, place, kill)
    again: list[str] = []
    whole = run_sweep(stored_cells(place), place, lambda stage, *_, **__: again.append(stage))
    assert not any(stage.startswith((chosen[0].folder, chosen[1].folder)) for stage in again)
    timeless = [[{**row, "seconds": 0} for row in one["rows"]] for one in (whole, result)]
    assert timeless[0] == timeless[1]
    for cell in chosen:
        files = [folder / cell.folder / "distilled.safetensors" for folder in (out, place)]
        assert files[0].read_bytes() == files[1].read_bytes()
    monkeypatch.setattr(sweep, "distill_task", None)  # finished runs are only read, also by another sweep
    assert run_sweep(stored_cells(place), place)["rows"] == whole["rows"]
    assert run_sweep(plan("match.iterations=4,2", "match.ipc=2"), place)["rows"] == [whole["rows"][3], whole["rows"][1]]


def test_a_run_with_another_config_is_refused(swept):
    out, _ = swept
    changed = [c._replace(config=c.config.model_copy(update={"seed": 1})) for c in stored_cells(out)]
    with pytest.raises(UserError, match=r"seed: 1: the run in .* was started with 0"):
        check_cells(changed, out)


def test_a_wrong_cell_is_refused_before_the_first_run_starts(tmp_path):
    with pytest.raises(UserError, match="--ipc: 500: class"):
        check_cells(plan("match.ipc=1,500"), tmp_path / "none")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"a": (1, 1, 2), "b": (0.1, 0.2, 0.3)}, ("b", True)),
        ({"a": ("x", "y"), "b": (1, 1)}, ("b", True)),
        ({"a": ("x", "y"), "b": (True, False)}, ("a", False)),
        ({"a": (None, 1), "b": ("x", "x")}, ("a", False)),
    ],
)
def test_the_axis_of_the_picture(tmp_path, values, expected):
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    assert choose_axis(list(values), rows) == expected
    points = [{**row, "network": "convnet", "accuracy": 0.5, "std": 0.1} for row in rows]
    save_curves(tmp_path / "c.png", list(values), points)
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_the_command_prints_the_result(swept, tmp_path):
    from typer.testing import CliRunner

    from tadperf.cli.app import app

    out, result = swept
    found = CliRunner().invoke(app, ["sweep", "--resume", "--out", str(out), "--json", "--quiet"])
    assert found.exit_code == 0
    assert json.loads(found.stdout) == json.loads(json.dumps(result))
    shown = CliRunner().invoke(app, ["sweep", "--resume", "--out", str(out), "--quiet"])
    for row in result["rows"]:
        assert f"{100 * row['accuracy']:.1f} ± {100 * row['std']:.1f}" in shown.stdout
