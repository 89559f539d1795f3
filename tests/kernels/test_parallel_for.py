"""The native threads (kernels/cpu/parallel.h), through an operator that uses them, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tadperf.kernels import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=native.reason()),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc"),
]

SETUP = """
import os, signal, sys, threading, time
import torch
from tadperf.kernels import per_sample

torch.set_num_threads(1)
logits, labels = torch.randn(20_000, 10), torch.randint(10, (20_000,))
expected = per_sample(logits, labels)

def right():
    return all(torch.equal(a, b) for a, b in zip(per_sample(logits, labels), expected))

def threads():
    return len(os.listdir("/proc/self/task"))

def in_child(function):
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # a child that hangs dies by it
        os._exit(0 if function() else 1)
    return os.waitpid(pid, 0)[1] == 0
"""


# A forked process may not use PyTorch's OpenMP, so there the threads are our own.
FORKED = """
if pid := os.fork():
    sys.exit(os.waitpid(pid, 0)[1] != 0)
"""


def run(script: str) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SETUP + script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


def test_threads_grow_sleep_and_let_the_interpreter_exit():
    run(
        FORKED
        + """
before, counts = threads(), []
for n in (1, 3, 2, 5, 4):
    torch.set_num_threads(n)
    assert right()
    counts.append(threads() - before)
assert counts == [0, 2, 2, 4, 4]

time.sleep(0.05)
before = time.process_time()
time.sleep(0.5)
assert time.process_time() - before < 0.02

names = [task for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
blocked = [line for name in names for line in open(f"/proc/self/task/{name}/status") if line.startswith("SigBlk")]
assert len(blocked) >= 4 and sum(int(line.split()[1], 16) >> signal.SIGINT - 1 & 1 for line in blocked) >= 4
"""
    )


def test_forks_and_calls_from_several_python_threads():
    """Forks: also a child's child, and children made while other threads are in the middle of calls."""
    run("""
def use():
    torch.set_num_threads(3)
    return threads() == 1 and right() and threads() == 3

torch.set_num_threads(3)
assert right()
assert in_child(use)
assert in_child(lambda: right() and in_child(use))
assert in_child(lambda: in_child(use) and use())

def call():
    torch.set_num_threads(3)
    while not stop:
        results.append(right())

stop, results = False, []
callers = [threading.Thread(target=call) for _ in range(3)]
for caller in callers:
    caller.start()
for _ in range(10):
    assert in_child(use)
    time.sleep(0.003)
stop = True
for caller in callers:
    caller.join(60)
assert not any(caller.is_alive() for caller in callers)
assert len(results) >= 10 and all(results)
""")
