"""The examples run, and say what is gained."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_examples_run_and_say_their_gain(file, tmp_path):
    run = subprocess.run(
        [sys.executable, file, "--quick"], capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    assert all(word in run.stdout for word in ("before", "after"))
    assert re.search(r"[\d.]+ times faster", run.stdout)


def test_examples_import_the_operators_and_little_else():
    found = {
        word for file in EXAMPLES.glob("*.py") for word in re.findall(r"^(?:from|import) (\w+)", file.read_text(), re.M)
    }
    assert found <= {"__future__", "argparse", "time", "torch", "numpy", "sklearn", "tadperf"}
    assert len(list(EXAMPLES.glob("*.py"))) == 2
