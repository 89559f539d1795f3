"""Runs a measurement in a process of its own, with a time limit for it and for the processes that it starts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any


def run_with_limit(command: Sequence[str], limit: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command like `subprocess.run(text=True)`. options: those of Popen.

    When it ends, all processes that it started are killed. Raises subprocess.TimeoutExpired after `limit` seconds.
    """
    with subprocess.Popen(command, text=True, start_new_session=True, **options) as process:
        try:
            out, errors = process.communicate(timeout=limit)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: not permitted if all have ended
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, errors)
