"""Small whole jobs of matching on the twin: nothing that CUDA refuses, and the results of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import JobReports, RunJobs, assert_results_of_cpu

# The parts of each job that must run as CUDA graphs, by a line in the stack of their recording.
GRAPHED = {
    "matching": ("experts/train.py", "matching/cuda_graph_sweep.py", "nets/students.py"),
    "ftd": ("experts/train.py", "matching/cuda_graph_sweep.py", "nets/students.py"),
    "tgdd": ("experts/train.py", "matching/features.py", "nets/students.py"),
    "sweep": ("experts/train.py", "matching/cuda_graph_sweep.py", "nets/students.py"),
}
# Operators that launch Triton kernels.
USED = {
    "matching": (
        "per_sample",
        "per_sample_gradient",
        "mixture",
        "reliability",
        "norm_relu_pool",
        "norm_relu_pool_gradient",
        "norm_relu_pool_dual",
        "norm_relu_pool_dual_gradient",
        "trajectory_distance",
        "trajectory_distance_gradient",
        "differentiable_augment",
        "differentiable_augment_adjoint",
    ),
    "ftd": ("trajectory_distance", "norm_relu_pool_dual", "differentiable_augment_adjoint"),
    "tgdd": ("norm_relu_pool", "norm_relu_pool_gradient", "differentiable_augment_adjoint"),
    "sweep": ("trajectory_distance", "norm_relu_pool_dual", "differentiable_augment_adjoint"),
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


@pytest.mark.parametrize("job", GRAPHED)
def test_a_job_does_not_import_the_compiler(on_twin: JobReports, job: str):
    assert not on_twin.reports[job]["compiler"], "importing torch._dynamo takes 2 s of every process"
