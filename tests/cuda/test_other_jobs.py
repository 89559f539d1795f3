"""Small whole jobs of refinement and the audit on the twin: nothing that CUDA refuses, and the results of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import JobReports, RunJobs, assert_results_of_cpu

# The parts of each job that must run as CUDA graphs, by a line in the stack of their recording.
GRAPHED = {
    "generative": ("refine/detector.py", "nets/students.py"),
    "audit": (),
}
# Operators that launch Triton kernels.
USED = {
    "generative": ("per_sample", "per_sample_gradient", "norm_relu_pool", "differentiable_augment", "diverse_pick"),
    "audit": ("per_sample", "mixture", "reliability", "norm_relu_pool", "differentiable_augment"),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def on_twin(run_jobs: RunJobs) -> JobReports:
    return run_jobs(*GRAPHED)


@pytest.mark.parametrize("job", GRAPHED)
def test_a_job_gives_the_results_of_the_cpu(on_twin: JobReports, tmp_path: Path, job: str):
    assert_results_of_cpu(on_twin, tmp_path, job)


@pytest.mark.parametrize("job", GRAPHED)
def test_a_job_records_all_of_its_graphs(on_twin: JobReports, job: str):
    on_twin.assert_recorded(job, GRAPHED[job])


@pytest.mark.parametrize("job", USED)
def test_a_job_uses_the_fused_operators(on_twin: JobReports, job: str):
    assert set(USED[job]) <= set(on_twin.reports[job]["kernels"])
