"""Runs all tests marked `interpreter` in one new process. They run the Triton kernels on CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    folder = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n",
        "0",
        "-m",
        "interpreter",
        "-p",
        "no:cacheprovider",
        str(folder),
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in [name for name in env if name.startswith("PYTEST_")]:
        del env[name]
    result = subprocess.run(command, env=env, cwd=folder.parents[1], capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
