"""The sweep of matching on fake tensors of real size, and a job on the CPU of a machine that has a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import jobs
from .conftest import RunScript

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_iteration_of_matching_reads_no_value_of_the_device(run_on_stub: RunScript):
    found = run_on_stub("fake_sweep.py")
    scalar, images, labels, end = "() cuda:0", "(100, 3, 32, 32) cuda:0", "(100, 10) cuda:0", "(320010,) cuda:0"
    assert found["formulas"][:4] == found["TESLA"][:4] == [scalar, images, scalar, end]
    assert found["autograd"][:5] == [scalar, images, labels, scalar, end]
    assert found["a read of a value"] == "refused"


def test_a_job_on_the_cpu_does_not_mind_a_visible_gpu(run_on_stub: RunScript, tmp_path: Path):
    run_on_stub("jobs.py", "cpu", tmp_path / "visible", "matching")
    jobs.matching(tmp_path / "matching", "cpu")
    for name in ("distilled.safetensors", "trust.safetensors"):
        expected = (tmp_path / "matching" / name).read_bytes()
        assert (tmp_path / "visible" / "matching" / name).read_bytes() == expected
