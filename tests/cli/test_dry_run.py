"""`tadperf distill --dry-run`: checks a job as a run does, prints what it would do, and writes nothing."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from tadperf.compute import device
from tadperf.config.schema import flatten_sections


def test_it_prints_settings_classes_stages_and_folder_and_writes_nothing(tadperf, tmp_path):
    code, out, err = tadperf("distill", "--ipc=5", "--set=match.iterations=7", "--device=cpu", "--dry-run")
    assert code == 0, err
    assert "preset digits" in err
    assert "digits: 1400 training and 397 test images of 1 x 8 x 8, with added noise asymmetric:0.4" in " ".join(
        out.split()
    )
    rows = [line.split() for line in out.splitlines()]
    counts = [row for row in rows if len(row) == 3 and row[0] in set("0123456789")]
    assert len(counts) == 10
    assert [sum(int(row[column]) for row in counts) for column in (1, 2)] == [1400, 397]
    assert ["match.iterations", "7", "5000"] in rows
    assert not any(row[:1] == ["match.check_every"] and row[1] == row[2] for row in rows)  # only what differs
    assert ["stages", "data,", "trust,", "experts,", "matching,", "evaluate"] in rows
    assert ["folder", "runs/digits-ipc5-seed0"] in rows
    assert list(tmp_path.iterdir()) == []


def test_the_json_object_and_the_command_that_shows_all_settings(tadperf, tmp_path):
    options = ("--trust=off", "--compare", "--out=my run", "--set=match.iterations=7", "--preset=digits")
    code, out, err = tadperf("distill", *options, "--device=cpu", "--dry-run", "--json", "--quiet")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert plan["stages"] == ["data", "experts", "matching", "evaluate"]
    assert (plan["folder"], plan["processes"], plan["resume"]) == ("my run", 1, False)
    assert plan["other_folders"] == ["my run/compare/on", "my run/compare/oracle"]
    assert plan["data"]["classes"][0].keys() == {"class", "train", "test"}
    _, shown, _ = tadperf(*shlex.split(plan["all_settings"])[1:], "--json", "--quiet")
    settings = flatten_sections(json.loads(shown))
    assert {field: settings[field] for field in plan["settings"]} == plan["settings"]
    assert plan["settings"]["match.iterations"] == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--ipc 1000", "--ipc: 1000: class"),
        ("--labels none.csv", "--labels: none.csv: "),
        ("--out taken/file/run", "--out: taken/file/run: "),
        ("--out taken", "--out: taken: exists already"),
        ("--resume --out none", "--resume: none: there is no such run folder"),
        ("--device cuda:99", "--device: cuda:99: "),
        ("--devices 0", "--devices: 0: "),
        ("--encoder none", "--encoder: "),
        ("--synthesis generative --set detector.path=none.safetensors", "none.safetensors"),
        ("--estimate", "--dry-run: --estimate: "),
    ],
)
def test_errors_are_those_of_a_run(tadperf, tmp_path, arguments, line):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    code, out, err = tadperf("distill", "--dry-run", "--quiet", *arguments.split())
    assert (code, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "taken"]


def test_more_processes_than_cuda_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device.check_ranks("cuda", 2, 2)
    with pytest.raises(ValueError, match="--devices: 3: only 2 CUDA devices found"):
        device.check_ranks("cuda", 3, 3)
    with pytest.raises(ValueError, match="--device: cuda:1: is one device for 2 ranks"):
        device.check_ranks("cuda:1", 2, 2)


def test_a_run_that_is_finished_or_has_other_settings(tadperf, tiny, tmp_path):
    small = [*tiny, "--trust=off"]
    assert tadperf("distill", *small, "--out=run", "--quiet").code == 0
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))
    code, out, _ = tadperf("distill", "--resume", "--out=run", "--dry-run")
    assert code == 0
    assert "none: the run is finished" in out
    assert "run/config.json" in out
    (tmp_path / "run/DONE").rename(tmp_path / "done")
    refused = tadperf("distill", "--resume", "--out=run", "--ipc=2", "--dry-run")
    assert refused.code == 2
    assert "was started with 1" in refused.err
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))[: len(before) - 3] == before[:-3]


def test_many_classes_with_long_names_fit_a_terminal(tadperf, tmp_path, monkeypatch):
    for number in range(23):
        folder = tmp_path / "set" / f"{number:02}-{'a class with a name of many words ' * 4}".strip()
        folder.mkdir(parents=True)
        for k in range(3):
            Image.fromarray(np.full((8, 8, 3), 10 * number + k, np.uint8)).save(folder / f"{k}.png")
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = tadperf(
        "distill", "set", "--ipc=1", "--trust=off", "--device=cpu", "--set=data.holdout=0.4", "--dry-run"
    )
    assert code == 0, err
    assert "3 other classes" in out
    assert max(map(len, out.splitlines())) <= 80
