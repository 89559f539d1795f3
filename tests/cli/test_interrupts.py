"""Ctrl-C ends a program once and does not disturb its cleanup. A second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

SWALLOWED = """
import os, signal, time
from tadperf.cli import app

class Dying:
    def __del__(self):  # Python prints an exception that is raised here, and continues
        os.kill(os.getpid(), signal.SIGTERM)

def job(**_):
    Dying()
    for _ in range(600):
        time.sleep(0.1)

app.app = job
app.main()
"""

REPLACED = """
import contextlib, os, pathlib, signal
from tadperf.cli import app
from tadperf.cli.common import resumable

def job(**_):
    with CONTEXT:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

app.app = job
app.main()
"""

CLEANUP = """
import contextlib, sys, time
from tadperf.cli import app

@contextlib.contextmanager
def resource():
    try:
        yield
    finally:
        try:
            raise OSError("an error that the cleanup handles")
        except OSError:
            print("cleaning", flush=True)
            time.sleep(SECONDS)
        print("clean", flush=True)

def job(**_):
    with resource():
        print("ready", flush=True)
        time.sleep(60)

app.app = job
app.main()
"""


def hear_interrupts() -> None:
    """A shell starts its background jobs with Ctrl-C ignored."""
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)


def run(script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=hear_interrupts)


def start(script: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, preexec_fn=hear_interrupts, **pipes)


def read_until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{word}\n"


def test_an_interrupt_that_python_swallows_is_raised_again():
    """Python swallows an interrupt inside a destructor or a callback of a fork."""
    process = run(SWALLOWED)
    assert "Exception ignored" in process.stderr
    assert process.returncode == 130
    assert process.stderr.splitlines()[-1] == "tadperf: interrupted"


@pytest.mark.parametrize("in_a_run", [False, True])
def test_an_interrupt_that_compiled_code_replaces_by_its_own_error_is_an_interrupt(in_a_run, tmp_path):
    """torch.tensor turns an interrupt into a ValueError, because it asks its argument for a length."""
    context = f"resumable('distill', pathlib.Path({str(tmp_path)!r}))" if in_a_run else "contextlib.nullcontext()"
    process = run(REPLACED.replace("CONTEXT", context))
    hint = f"; continue with: tadperf distill --resume --out {tmp_path}" if in_a_run else ""
    assert (process.returncode, process.stderr) == (130, f"tadperf: interrupted{hint}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_cleanup_of_several_seconds_is_not_interrupted(number):
    process = start(CLEANUP.replace("SECONDS", "2.5"))
    read_until(process, "ready")
    process.send_signal(number)
    process.send_signal(number)  # a terminal and a shell may both send it
    out, err = process.communicate(timeout=60)
    assert out == "cleaning\nclean\n"
    assert (process.returncode, err) == (130, "tadperf: interrupted\n")


def test_a_second_interrupt_ends_at_once():
    process = start(CLEANUP.replace("SECONDS", "60"))
    read_until(process, "ready")
    process.send_signal(signal.SIGINT)
    read_until(process, "cleaning")
    time.sleep(0.7)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10
    assert out == ""
    assert (process.returncode, err) == (130, "tadperf: interrupted again; ended at once\n")


def test_an_ignored_signal_stays_ignored():
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + CLEANUP.replace("SECONDS", "0")
    process = start(script)
    read_until(process, "ready")
    process.send_signal(signal.SIGHUP)  # nohup makes a program ignore it
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
