"""Independent tasks over the cores of one machine."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

T = TypeVar("T")
PR_SET_PDEATHSIG = 1
PARALLEL_FROM = 1_000_000  # activations of a step's widest layer

# Set before the fork, so that a worker inherits task and items without a copy and neither has to be picklable.
_work: tuple[Callable[[Any], Any], Sequence[Any]] | None = None


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(activations: int) -> int:
    """Threads worth having in this process for steps whose widest layer has so many activations.

    Measured on 2 cores, ConvNet of width 32 on 50 digits (1e5 activations), 10 exact matching steps: one thread 0.17 s,
    two 0.13 s when nothing else runs but 0.6 to 7 s when something does, since every small operation waits for both.
    """
    return cores() if activations >= PARALLEL_FROM else 1


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed parent leaves no orphan that goes on writing
    if os.getppid() != parent:
        os._exit(1)
    torch.set_num_threads(1)


def _call(position: int) -> Any:
    assert _work is not None
    task, items = _work
    return task(items[position])


def run(task: Callable[[Any], T], items: Sequence[Any], workers: int | None = None) -> Iterator[tuple[int, T]]:
    """Yields (position, task(item)) as tasks finish, in forked processes, by default one per core.

    A forked worker sees the caller's tensors without a copy and a result is pickled back, so return small values, and
    no tensors: PyTorch sends those through files in /tmp, which a killed worker leaves behind.
    Every task has one thread, however many there are: OpenMP hangs with more after a fork, and the bits of a sum change
    with their number, so that a run resumed with its last expert to train would end in other bytes.
    """
    global _work
    workers = min(workers or cores(), len(items))
    if workers <= 1 or not sys.platform.startswith("linux"):
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for position, item in enumerate(items):
                yield position, task(item)
        finally:
            torch.set_num_threads(before)
        return
    _work = task, items
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (os.getpid(),))
    try:
        with warnings.catch_warnings():
            # Python warns of forking beside threads; a worker takes none of the parent's locks: it never prints.
            warnings.simplefilter("ignore", DeprecationWarning)
            futures = {pool.submit(_call, position): position for position in range(len(items))}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(cancel_futures=True)
        _work = None
