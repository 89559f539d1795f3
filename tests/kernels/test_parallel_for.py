"""Tests the native threads (kernels/cpu/common/parallel.h) by operators that use them, each in a new process."""

from __future__ import annotations

import os
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
from tadperf.kernels import native, per_sample, thread_pool

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
        signal.alarm(30)  # ends a child that hangs
        os._exit(0 if function() else 1)
    return os.waitpid(pid, 0)[1] == 0
"""


# A forked process cannot use PyTorch's OpenMP, so its threads are those of our own pool.
FORKED = """
if pid := os.fork():
    sys.exit(os.waitpid(pid, 0)[1] != 0)
"""


USE = """
def use():
    torch.set_num_threads(3)
    return threads() == 1 and right() and threads() == 3
"""

PRELOADED = os.environ.get("LD_PRELOAD", "")


def run(script: str, **environment: str) -> None:
    """Runs a script after SETUP. A sanitizer build may need a minute to import PyTorch, hence the long time limit."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SETUP + script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr


def test_pool_grows_sleeps_and_lets_the_interpreter_exit() -> None:
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


def test_forks() -> None:
    """In a child, and in a child of a child."""
    run(
        USE
        + """
torch.set_num_threads(3)
assert right()
assert in_child(use)
assert in_child(lambda: right() and in_child(use))
assert in_child(lambda: in_child(use) and use())
"""
    )


@pytest.mark.skipif("libasan.so" in PRELOADED, reason="the allocator of GCC 12's libasan keeps its locks across a fork")
def test_forks_during_calls_of_several_python_threads() -> None:
    run(
        USE
        + """
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
"""
    )


def test_alternating_with_pytorch_starts_no_threads() -> None:
    """libgomp ends the threads that a smaller team leaves idle, and starts new ones for the next larger team."""
    run("""
assert native.module().thread_pool() == "openmp"
torch.set_num_threads(6)
big = torch.randn(1_000_000)

def both():
    big.sin_()
    per_sample(logits[:10_000], labels[:10_000])  # enough work for 3 of the 6 threads
    return set(os.listdir("/proc/self/task"))

before = both()
assert len(before) >= 6
assert set().union(*(both() for _ in range(20))) == before
""")


def test_the_openmp_of_torch_is_used_although_others_are_loaded() -> None:
    run("""
import ctypes, sklearn.utils._openmp_helpers
from pathlib import Path
loaded = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
address, path = thread_pool.openmp_of_torch()
assert str(path) in loaded and path.is_relative_to(Path(torch.__file__).parent.parent), (path, loaded)
assert thread_pool.configure(native.module()) == f"libgomp of torch ({path})"
""")


def test_pool_on_request() -> None:
    run(
        """
assert thread_pool.configure(native.module()) == "own pool (TADPERF_THREADS=pool)"
assert native.module().thread_pool() == "pool"
before = threads()
torch.set_num_threads(3)
assert right() and threads() == before + 2
""",
        TADPERF_THREADS="pool",
    )


@pytest.mark.skipif("san.so" in PRELOADED, reason="a sanitizer needs terabytes of addresses")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("pool", ["", "pool"])
def test_lack_of_memory_in_a_thread_is_a_memory_error(threads: int, pool: str) -> None:
    """Each image needs 2 x 67 MB of transformed tiles; the process may use only 40 MB more. Later calls work again."""
    run(
        f"""
import resource
from tadperf.kernels.ops.conv3x3 import conv3x3
torch.set_num_threads({threads})
x = torch.randn(4, 32, 512, 256).contiguous(memory_format=torch.channels_last)
kernel = torch.randn(32, 32, 3, 3)
y = conv3x3(x, kernel)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + x.nbytes + (40 << 20), resource.RLIM_INFINITY))
for _ in range(3):
    try:
        conv3x3(x, kernel)
    except MemoryError:
        pass
    else:
        raise AssertionError("no MemoryError")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(conv3x3(x, kernel), y) and right()
""",
        TADPERF_THREADS=pool,
    )
