"""Fixtures: a process on the twin of a CUDA device, and the comparison of two run folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tadperf.files import load_tensors

from . import stub

HERE = Path(__file__).parent
RunOnTwin = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run_on_twin() -> RunOnTwin:
    """Returns a function that runs a script of this folder on the twin, and returns the JSON of its last line."""
    try:
        stub.build()
    except stub.UnavailableError as error:
        pytest.skip(str(error))

    def run(script: str, *arguments: object) -> dict[str, Any]:
        command = [sys.executable, HERE / "run_twin.py", HERE / script, *map(str, arguments)]
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1])

    return run


def largest_error(folder: Path, other: Path, name: str) -> float:
    """Returns the largest relative error of a tensor file's floating-point tensors; all others must be equal."""
    (tensors, _), (expected, _) = load_tensors(folder / name), load_tensors(other / name)
    assert tensors.keys() == expected.keys()
    errors = [0.0]
    for key, value in expected.items():
        if value.is_floating_point():
            errors.append(float((tensors[key] - value).norm() / value.norm().clamp(min=1e-30)))
        else:
            assert torch.equal(tensors[key], value), key
    return max(errors)
