"""Independent tasks over the cores of one machine, and over all ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

from tadperf.compute import ranks

T = TypeVar("T")
PARALLEL_FROM = 1_000_000  # activations of a step's widest layer

# Set before the fork, so that a worker inherits task and items without a copy and neither has to be picklable.
_work: tuple[Callable[[Any], Any], Sequence[Any]] | None = None


def available_cores() -> int:
    """Processors that this process may use: an even share of them where several ranks run on the machine."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count // ranks.local_world_size())


def threads_for(activations: int) -> int:
    """Threads worth having in this process for steps whose widest layer has so many activations.

    Measured on 2 cores, ConvNet of width 32 on 50 digits (1e5 activations), 10 exact matching steps: one thread 0.17 s,
    two 0.13 s when nothing else runs but 0.6 to 7 s when something does, since every small operation waits for both.
    """
    return available_cores() if activations >= PARALLEL_FROM else 1


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ranks.exit_with_parent(parent)
    torch.set_num_threads(1)


def _call(position: int) -> Any:
    assert _work is not None
    task, items = _work
    with ranks.task():
        return task(items[position])


def run_parallel(task: Callable[[Any], T], items: Sequence[Any], workers: int | None = None) -> Iterator[tuple[int, T]]:
    """Yields (position, task(item)) as tasks finish, in forked processes, by default one per core.

    Ranks divide the items and exchange the results, so that each of them yields all: the items must be the same on all.

    A forked worker sees the caller's tensors without a copy and a result is pickled back, so return small values, and
    no tensors: PyTorch sends those through files in /tmp, which a killed worker leaves behind.
    Every task has one thread, however many there are: OpenMP hangs with more after a fork, and the bits of a sum change
    with their number, so that a run resumed with its last expert to train would end in other bytes.
    """

    def work(own: Sequence[int]) -> Iterator[tuple[int, T]]:
        return _run_here(task, [items[position] for position in own], workers)

    return ranks.divide_work(work, len(items))


def _run_here(task: Callable[[Any], T], items: Sequence[Any], workers: int | None) -> Iterator[tuple[int, T]]:
    workers = min(workers or available_cores(), len(items))
    if workers <= 1 or not sys.platform.startswith("linux"):
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for position, item in enumerate(items):
                with ranks.task():
                    result = task(item)
                yield position, result
        finally:
            torch.set_num_threads(before)
        return
    with BackgroundTasks() as pool:
        pool.start(task, items, workers)
        yield from pool.rest()


class BackgroundTasks:
    """Tasks in forked processes beside whatever the caller does meanwhile; leaving the block ends them."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._futures: dict[Future[Any], int] = {}

    def start(self, task: Callable[[Any], Any], items: Sequence[Any], workers: int) -> None:
        """Begins task(item) for all items, so many at once; what `run` says of tasks and results holds here too."""
        global _work
        assert self._pool is None, "one start to a block"
        _work = task, items
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (os.getpid(),))
        try:
            with warnings.catch_warnings():
                # Python warns of forking beside threads; a worker takes none of the parent's locks: it never prints.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._futures = {self._pool.submit(_call, position): position for position in range(len(items))}
        finally:
            _work = None  # every worker has its own by now

    def ready(self) -> Iterator[tuple[int, Any]]:
        """(position, result) of the tasks that have ended since the last call; does not wait."""
        for future in [future for future in self._futures if future.done()]:
            yield self._futures.pop(future), future.result()

    def rest(self) -> Iterator[tuple[int, Any]]:
        """(position, result) of all others, as they end."""
        for future in as_completed(list(self._futures)):
            yield self._futures.pop(future), future.result()

    def waited_for(self) -> list[int]:
        """Positions of those others."""
        return list(self._futures.values())

    def cancel(self) -> None:
        """Takes back the tasks that no worker has begun."""
        self._futures = {future: position for future, position in self._futures.items() if not future.cancel()}

    def __enter__(self) -> BackgroundTasks:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown(cancel_futures=True)
