"""Fixtures: a process on the twin of a CUDA device, and the comparison of its run folders with those of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tadperf.files import load_tensors

from . import jobs, stub

HERE = Path(__file__).parent
TOLERANCE = 1e-5  # relative; the CPU's own results change by up to 1e-6 if the weights change by one rounding
COMPARED = ("distilled.safetensors", "trust.safetensors", "expert-*.safetensors")


class JobReports(NamedTuple):
    """The folder of the jobs that ran on the twin, and the report of each."""

    folder: Path
    reports: dict[str, Any]

    def assert_recorded(self, job: str, lines: Sequence[str]) -> None:
        """Checks that a graph was recorded and replayed below each of the lines."""
        recorded = [line for line, _ in self.reports[job]["graphs"]]
        for wanted in lines:
            assert any(wanted in line for line in recorded), f"no CUDA graph was recorded below {wanted}"
        counts = self.reports[job]["counts"]
        assert counts.get("graph replay", 0) >= counts.get("graph record", 0) >= len(lines)


RunScript = Callable[..., dict[str, Any]]
RunOnTwin = RunScript
RunJobs = Callable[..., JobReports]


@pytest.fixture(scope="session")
def stub_of_cuda() -> None:
    """Skips the test if the stub cannot be built here."""
    try:
        stub.build()
    except stub.UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def run_on_twin(stub_of_cuda: None) -> RunScript:
    """Returns a function that runs a script of this folder on the twin, and returns the JSON of its last line."""
    return partial(_run, "run_twin.py")


@pytest.fixture(scope="session")
def run_on_stub(stub_of_cuda: None) -> RunScript:
    """Returns a function that runs a script of this folder by run_stub.py, and returns the JSON of its last line."""
    return partial(_run, "run_stub.py")


def _run(runner: str, script: str, *arguments: object) -> Any:
    command = [sys.executable, HERE / runner, HERE / script, *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run_jobs(run_on_twin: RunScript, tmp_path_factory: pytest.TempPathFactory) -> RunJobs:
    """Returns a function that runs jobs of jobs.py on the twin, in one process."""
    folder = tmp_path_factory.mktemp("twin")
    return lambda *names: JobReports(folder, run_on_twin("jobs.py", "cuda", folder, *names))


def assert_results_of_cpu(on_twin: JobReports, tmp_path: Path, job: str) -> None:
    """Runs a job on the CPU, too, and compares the tensors and accuracies of both."""
    jobs.JOBS[job](tmp_path / job, "cpu")
    expected = sorted(path for name in COMPARED for path in (tmp_path / job).rglob(name))
    assert expected
    for path in expected:
        error = largest_error(on_twin.folder / path.relative_to(tmp_path), path)
        assert error < TOLERANCE, f"{path.relative_to(tmp_path)} differs by {error:.1e}"
    for path in (tmp_path / job).rglob("result.json"):
        result, wanted = (
            json.loads((place / path.relative_to(tmp_path)).read_text()) for place in (on_twin[0], tmp_path)
        )
        assert result["accuracy"] == wanted["accuracy"]
        assert result["baselines"] == wanted["baselines"]
    for path in (tmp_path / job).rglob("evaluation.json"):
        assert (on_twin.folder / path.relative_to(tmp_path)).read_text() == path.read_text()
    assert not on_twin.reports[job]["problems"]


def largest_error(file: Path, other: Path) -> float:
    """Returns the largest relative error of a file's floating-point tensors; all other tensors must be equal."""
    (tensors, _), (expected, _) = load_tensors(file), load_tensors(other)
    assert tensors.keys() == expected.keys()
    errors = [0.0]
    for key, value in expected.items():
        if value.is_floating_point():
            errors.append(float((tensors[key] - value).norm() / value.norm().clamp(min=1e-30)))
        else:
            assert torch.equal(tensors[key], value), f"{key} of {file.name} differs"
    return max(errors)
