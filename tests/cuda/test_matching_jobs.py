"""Whole small matching jobs on the twin of a CUDA device: nothing that CUDA refuses, and the results of the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from . import jobs
from .conftest import RunOnTwin, largest_error

TOLERANCE = 1e-5
NAMES = ("matching",)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def on_twin(run_on_twin: RunOnTwin, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("twin")
    return folder, run_on_twin("jobs.py", folder, *NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_job_gives_the_results_of_the_cpu(on_twin: tuple[Path, dict[str, Any]], tmp_path: Path, name: str):
    folder, reports = on_twin
    on_cpu = tmp_path / "cpu"
    jobs.JOBS[name](on_cpu, "cpu")
    experts = sorted(path.relative_to(on_cpu) for path in on_cpu.glob("experts/*.safetensors"))
    assert len(experts) == 2
    for file in ("distilled.safetensors", "trust.safetensors", *experts):
        assert largest_error(folder / name, on_cpu, str(file)) < TOLERANCE, file
    result, expected = (json.loads((place / "result.json").read_text()) for place in (folder / name, on_cpu))
    assert result["accuracy"] == expected["accuracy"]
    assert result["baselines"] == expected["baselines"]
    assert not reports[name]["problems"]


@pytest.mark.parametrize("name", NAMES)
def test_a_job_records_its_graphs(on_twin: tuple[Path, dict[str, Any]], name: str):
    report = on_twin[1][name]
    lines = " ".join(line for line, _ in report["graphs"])
    assert "nets/training.py" in lines
    assert "matching/cuda_graph_sweep.py" in lines
    assert report["counts"]["graph replay"] > report["counts"]["graph record"]
