"""A process with a time limit leaves no other process behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tadperf.bench.processes import run_with_limit
from tadperf.bench.tools import gpu_check

# Starts a process that holds stdout and stderr, writes its number to a file, then does what the first argument says.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[2], "w").write(str(child.pid))
if sys.argv[1] == "hang":
    time.sleep(60)
"""


def ended(file: Path) -> bool:
    """Returns whether the process of this number ends within 5 s. A zombie has ended."""
    status = Path("/proc") / file.read_text() / "status"
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("action", ["hang", "end"])
def test_the_processes_of_a_process_are_killed_with_it(tmp_path, action):
    command = [sys.executable, "-c", PARENT, action, str(tmp_path / "pid")]
    begun = time.monotonic()
    rows, failure = gpu_check.run_process(command, 5.0)
    assert (rows, failure) == ([], "stopped after 5 s: silent" if action == "hang" else "")
    assert time.monotonic() - begun < 30
    assert ended(tmp_path / "pid")


def test_output_and_exit_code():
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = run_with_limit([sys.executable, "-c", code], 30.0, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    with pytest.raises(subprocess.TimeoutExpired):
        run_with_limit([sys.executable, "-c", "import time; time.sleep(60)"], 0.2, stdout=subprocess.PIPE)
