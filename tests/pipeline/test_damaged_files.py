"""Damaged files in a run folder give one-line errors. Without these files, a resumed run ends with the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tadperf
from tadperf import files
from tadperf.errors import UserError
from tadperf.pipeline.sweep import parse_axes, run_sweep, stored_cells, sweep_cells
from tadperf.run.folder import finished_result

pytestmark = pytest.mark.usefixtures("one_thread")
MATCHING = "checkpoints/matching.safetensors"
INITIAL = "checkpoints/initial.safetensors"
SCORES = "checkpoints/evaluate.json"
DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "text": lambda data: b"not what was here\n",
    "an empty list": lambda data: b"[]",
    "a list of lists": lambda data: b"[[1, 2], [3, 4]]",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Path:
    """Returns the folder of a finished generative run, which has all files but the matching checkpoint."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    tadperf.distill(tiny_config(synthesis="hybrid"), folder)
    return folder


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """Returns a copy of the run folder that a killed run left behind after its last student."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "DONE").unlink()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the files that an error must not change."""
    ignored = ("env.json", "metrics.jsonl", "stages.json", ".lock", "grid.png")
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in ignored
    }


def assert_refused_and_repairable(folder: Path, name: str, config: Any, finished: Path) -> None:
    """Resuming names the damaged file and changes nothing. After it is deleted, the run ends with the same bytes."""
    before = contents(folder)
    with pytest.raises(UserError) as error:
        tadperf.distill(config, folder, resume=True)
    assert str(folder / name) in str(error.value)
    assert "delete it" in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(folder) == before
    (folder / name).unlink()
    tadperf.distill(config, folder, resume=True)
    for same in ("distilled.safetensors", INITIAL, "refined.json"):
        assert (folder / same).read_bytes() == (finished / same).read_bytes(), same
    ours, expected = (json.loads((place / "result.json").read_bytes()) for place in (folder, finished))
    assert {key: ours[key] for key in ("accuracy", "baselines", "refine", "trust", "lr")} == {
        key: expected[key] for key in ("accuracy", "baselines", "refine", "trust", "lr")
    }


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["distilled.safetensors", INITIAL, SCORES, "refined.json"])
def test_a_damaged_file_of_a_stage_that_is_finished(unfinished, finished, tiny_config, name, damage):
    (unfinished / name).write_bytes(DAMAGE[damage]((unfinished / name).read_bytes()))
    assert_refused_and_repairable(unfinished, name, tiny_config(synthesis="hybrid"), finished)


@pytest.mark.parametrize("name", ["distilled.safetensors", INITIAL, SCORES, "refined.json", MATCHING])
def test_a_missing_file_is_made_again(unfinished, finished, tiny_config, name):
    (unfinished / name).unlink()
    tadperf.distill(tiny_config(synthesis="hybrid"), unfinished, resume=True)
    for same in ("distilled.safetensors", INITIAL, "refined.json"):
        assert (unfinished / same).read_bytes() == (finished / same).read_bytes(), same


def other_shapes(file: Path) -> None:
    tensors, metadata = files.load_tensors(file)
    tensors["state.images"] = torch.zeros(3, 1, 4, 4)
    files.save_tensors(file, tensors, metadata)


def no_score(file: Path) -> None:
    files.save_tensors(file, files.load_tensors(file)[0], {"other": "1"})


def no_state(file: Path) -> None:
    tensors, metadata = files.load_tensors(file)
    files.save_tensors(file, {name: t for name, t in tensors.items() if not name.startswith("state.")}, metadata)


def names_without_dots(file: Path) -> None:
    tensors, metadata = files.load_tensors(file)
    files.save_tensors(file, {name.replace(".", "-"): t for name, t in tensors.items()}, metadata)


@pytest.mark.parametrize("damage", [*DAMAGE, other_shapes, no_score, no_state, names_without_dots])
def test_a_damaged_matching_checkpoint(unfinished, finished, tiny_config, damage):
    (unfinished / "distilled.safetensors").unlink()  # as if the run had been killed while matching
    if callable(damage):
        damage(unfinished / MATCHING)
    else:
        (unfinished / MATCHING).write_bytes(DAMAGE[damage]((unfinished / MATCHING).read_bytes()))
    assert_refused_and_repairable(unfinished, MATCHING, tiny_config(synthesis="hybrid"), finished)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_of_a_finished_run(finished, tmp_path, tiny_config, damage):
    folder, config = tmp_path / "run", tiny_config(synthesis="hybrid")
    shutil.copytree(finished, folder)
    (folder / "result.json").write_bytes(DAMAGE[damage]((folder / "result.json").read_bytes()))
    with pytest.raises(UserError, match=r"result\.json"):
        finished_result(folder, config)
    (folder / "result.json").unlink()
    with pytest.raises(UserError, match=r"result\.json: is missing; delete the file DONE"):
        tadperf.distill(config, folder, resume=True)
    (folder / "DONE").unlink()
    tadperf.distill(config, folder, resume=True)
    ours, expected = (json.loads((place / "result.json").read_bytes()) for place in (folder, finished))
    assert ours["accuracy"] == expected["accuracy"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_sweep(tmp_path, tiny_config, damage):
    out = tmp_path / "sweep"

    def cells() -> Any:
        axis = parse_axes(["match.iterations=2,4"])
        return sweep_cells(axis, lambda sets: tiny_config(match__iterations=int(sets[0].rpartition("=")[2])))

    rows = run_sweep(cells(), out)["rows"]
    (out / "sweep.json").write_bytes(DAMAGE[damage]((out / "sweep.json").read_bytes()))
    with pytest.raises(UserError, match=r"sweep\.json: is damaged; give the fields and values again"):
        stored_cells(out)
    assert run_sweep(cells(), out)["rows"] == rows  # finished runs are only read
    assert [cell.folder for cell in stored_cells(out)] == [cell.folder for cell in cells()]
