"""gpu_check runs its steps on the CPU, and every failure becomes a row."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from tadperf.bench.operators import cases, catalogue, checks, engine, report
from tadperf.bench.tools import gpu_check

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def light(monkeypatch):
    monkeypatch.setattr(engine, "COPY_BYTES", {"cpu": 2**20})


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_hard_values_empty_inputs_and_gradients(name, one_thread):
    bench = catalogue.load(name)
    inputs = bench.inputs(cases.SMALL[name], torch.float32, CPU, 0)
    assert checks.check_hard_values(bench, CPU) == ""
    assert checks.compare_with_reference(bench, cases.without_samples(name, inputs)) == ""
    assert checks.compare_bits(checks.run_operator(bench, inputs), checks.run_operator(bench, inputs)) == ""
    if name in cases.GRADIENTS:
        assert checks.check_gradient(bench, inputs) == ""
    if name in cases.HUGE:
        few = {key: value[-2:] for key, value in checks.run_operator(bench, inputs)._asdict().items()}
        assert engine.mismatch(bench.reference(*cases.last_rows(name, inputs, 2)), few, bench) == ""


def test_a_wrong_operator_fails_its_checks():
    bench = catalogue.load("per_sample")
    right = bench.providers["tadperf"].build()
    wrong = bench._replace(
        providers={
            "tadperf": engine.Provider("tadperf", lambda: lambda *a: (r := right(*a))._replace(loss=1.01 * r.loss))
        }
    )
    inputs = bench.inputs((50, 7), torch.float32, CPU, 0)
    assert checks.check_hard_values(wrong, CPU).startswith("loss: ")
    assert checks.compare_with_reference(wrong, inputs).startswith("loss: ")
    assert checks.check_gradient(wrong, inputs).startswith("relative error 1.0e-02")
    negated = right(*inputs)._replace(margin=-right(*inputs).margin)
    assert checks.compare_bits(right(*inputs), negated) == "bits differ: margin"


def test_a_failure_becomes_a_row():
    def fails() -> str:
        raise ValueError("one\ntwo")

    def skips() -> str:
        raise checks.SkipError("not here")

    rows = [checks.run_check("op", "check", function) for function in (fails, skips, str, lambda: "differs")]
    assert [(row["status"], row["detail"]) for row in rows] == [
        ("FAIL", "ValueError: one"),
        ("SKIP", "not here"),
        ("PASS", ""),
        ("FAIL", "differs"),
    ]


def test_figures_are_compared_with_their_goals(monkeypatch):
    bench = catalogue.load("mixture")
    found = {"operator": "mixture", "shape": "50000x10", "error": None, "share_of_copy": 0.1}
    for median, status in ((0.9, "PASS"), (1.1, "FAIL")):
        monkeypatch.setattr(checks, "measure_case", lambda *a, m=median: [{**found, "median_ms": m}])
        monkeypatch.setattr(report, "facts", lambda *a: {})
        rows = list(checks.measure_size(bench, (50_000, 10), torch.device("cuda"), True))
        assert rows[0]["status"] == status
    assert rows[0]["detail"] == "median_ms is 1.1, goal below 1.0"


def test_rows_of_a_process_that_hangs_or_dies_are_kept():
    script = "import sys, time; print('{\"check\": 1}', flush=True); {}"
    rows, ended = gpu_check.run_process([sys.executable, "-c", script.replace("{}", "time.sleep(60)")], 3.0)
    assert (rows, ended) == ([{"check": 1}], "stopped after 3 s: silent")
    rows, ended = gpu_check.run_process([sys.executable, "-c", script.replace("{}", "sys.exit('gone')")], 30.0)
    assert (rows, ended) == ([{"check": 1}], "exit code 1: gone")
    assert gpu_check.check_operators(["mixture"], "cpu", True, time.monotonic())[0]["detail"] == "no time was left"


def test_one_operator_from_the_command_line(tmp_path, capsys):
    code = gpu_check.main(["trajectory_distance", "--device", "cpu", "--quick", "--json", str(tmp_path / "r.json")])
    out = capsys.readouterr().out
    assert code == 0, out
    result = json.loads((tmp_path / "r.json").read_text())
    assert {row["check"] for row in result["checks"]} >= {"hard values", "no samples", "torch.compile", "memcheck"}
    assert [row["provider"] for row in result["rows"]] == ["tadperf"]
    assert "without failure" in out.splitlines()[-1]
