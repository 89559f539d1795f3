"""gpu_plan runs its stages on the CPU, keeps what a stopped stage had, and writes a page with every goal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tadperf.bench.stages import experts, matching
from tadperf.bench.tools import gpu_page, gpu_plan
from tadperf.config import NetConfig
from tadperf.nets.training import Recipe

CPU = torch.device("cpu")
SCRIPT = Path(__file__).parents[2] / "bench" / "tools" / "gpu_plan.sh"
NET = NetConfig.model_validate({"width": 5, "depth": 1})


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(matching.SIZES, "digits", matching.Case((1, 8, 8), 7, 4, NET, ipc=1))
    recipe = Recipe(1, 8, 0.1, 0.0, 0.0, "flip", decay=False)
    monkeypatch.setitem(experts.SIZES, "digits", experts.Case(NET, (1, 8, 8), 20, 1, recipe))


def run_script(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {"DEVICE": "cpu", "STATE": str(state), "FILES": str(state / "none"), "PY": sys.executable}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=200, check=False)


def write(folder: Path, name: str, *values: object) -> None:
    (folder / name).write_text("".join(json.dumps(value) + "\n" for value in values))


def test_the_script_does_only_what_is_missing_and_writes_the_page(tmp_path):
    first = run_script(tmp_path, "100", "sanitize", "jobs_of_another_call")
    assert "sanitize: exit code 0" in first.stdout
    assert "command not found" in first.stderr  # an unknown stage fails, the others run
    again = run_script(tmp_path, "100", "sanitize")
    assert "sanitize: done before" in again.stdout
    assert run_script(tmp_path, "10", "facts").stdout.count("no time left") == 1
    page = (tmp_path / "out" / "page.md").read_text()
    assert page.startswith("# tadperf on an unknown device")
    assert "SKIP compute-sanitizer" in page


def test_a_measurement_that_fails_becomes_a_result(capsys):
    facts: gpu_plan.Facts = {}
    gpu_plan.record(facts, "broken", lambda: 1 / 0)
    gpu_plan.record(facts, "right", lambda: 7)
    assert facts == {"broken": {"error": "ZeroDivisionError: division by zero"}, "right": 7}
    assert "broken" in capsys.readouterr().out


def test_matching_and_experts_are_measured(tmp_path, tiny, one_thread):
    gpu_plan.measure_matching(tmp_path, CPU)
    rows = json.loads((tmp_path / "matching.json").read_text())
    for name in ("formulas, CUDA graph", "published"):
        assert rows[name]["gradient_error_t3"] < 1e-4
        assert rows[name]["median_ms"] == pytest.approx(sorted(rows[name]["ms"])[2], abs=1e-3)
    assert 1e-4 < rows["formulas, bfloat16, CUDA graph"]["gradient_error_t3"] < 1
    assert rows["kernels of one iteration, formulas, float32"]["kernels"] > 10
    gpu_plan.measure_experts(tmp_path, CPU)
    rows = json.loads((tmp_path / "experts.json").read_text())
    assert rows["tadperf"]["images_s"] > 0
    assert rows["step of 64"]["eager_ms"] > 0
    assert not [row for row in rows.values() if isinstance(row, dict) and "error" in row]
    text = "\n".join(gpu_page.page(tmp_path))
    assert "kernels of four steps" in text


def test_goals_are_marked(tmp_path):
    write(
        tmp_path,
        "matching.json",
        {
            "case": "c",
            "published": {"median_ms": 90.0, "peak_mb": 1000},
            "formulas, CUDA graph": {"median_ms": 25.0, "peak_mb": 250},
        },
    )
    write(
        tmp_path,
        "speed.jsonl",
        {"operator": "per_sample", "shape": "1000000x100", "provider": "tadperf", "share_of_copy": 0.93},
        {"operator": "per_sample", "shape": "1000000x100", "provider": "eager", "share_of_copy": 0.1},
        {"operator": "mixture", "shape": "50000x10", "provider": "tadperf", "median_ms": 1.5},
    )
    lines = gpu_page.goals(tmp_path)
    assert "| matching iteration over the published unroll | 3.6 | met (goal: at least 3) |" in lines
    assert "| its share of the published memory | 0.25 | missed (goal: at most 0.2) |" in lines
    assert "| per_sample 1000000x100: share_of_copy | 0.93 | met (goal: at least 0.9) |" in lines
    assert "| mixture 50000x10: median_ms | 1.5 | missed (goal: at most 1) |" in lines
    assert "| training of experts, images/s |  | not measured (goal: at least 350000) |" in lines


def test_jobs_and_failures_stand_on_the_page(tmp_path):
    run = tmp_path / "job-on"
    run.mkdir()
    write(run, "result.json", {"accuracy": {"convnet": {"mean": 0.612, "std": 0.004}}})
    write(run, "stages.json", {"trust": {"seconds": 12.4}})
    write(
        run, "metrics.jsonl", {"stage": "trust", "step": 1, "trusted": 0.7}, {"stage": "matching", "step": 1, "loss": 1}
    )
    gpu_plan.collect_jobs(tmp_path, CPU)
    assert json.loads((tmp_path / "jobs.json").read_text())["on"]["trust"][0]["trusted"] == 0.7
    fail = {"operator": "mixture", "check": "same bits", "status": "FAIL", "detail": "a | b", "seconds": 1}
    write(tmp_path, "checks.jsonl", fail, fail | {"status": "PASS"})
    (tmp_path / "first.txt").write_text("PASS tiny job auto {}\nchecks of mixture: exit code 0\n")
    text = "\n".join(gpu_page.page(tmp_path))
    assert "| on | 61.2 ± 0.4 % | trust 12 |" in text
    assert "1 passed, 1 failed, 0 skipped" in text
    assert "| mixture | same bits | a \\| b |" in text
    assert "- `PASS tiny job auto {}`" in text


def test_arguments_of_the_programs(tmp_path, capsys):
    assert gpu_plan.main(["nothing", "x", "cpu"]) == 2
    assert "STAGE is one of facts" in capsys.readouterr().out
    assert gpu_page.main([str(tmp_path / "missing")]) == 2
    assert "give the folder" in capsys.readouterr().err
    assert gpu_plan.main(["jobs", str(tmp_path), "cpu"]) == 0
    assert json.loads((tmp_path / "jobs.json").read_text()) == {}
