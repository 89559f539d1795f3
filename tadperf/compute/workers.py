"""Runs independent tasks on the cores of one machine, and over all ranks."""

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
from tadperf.compute.torch_settings import torch_settings

T = TypeVar("T")
PARALLEL_FROM = 1_000_000  # activations of a step's widest layer; not tuned beyond the figures of `threads_for`


def available_cores() -> int:
    """Returns the processors that this process may use: an equal share if several ranks run on the machine."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count // ranks.local_world_size())


def threads_for(activations: int) -> int:
    """Returns the number of threads for steps whose widest layer has `activations` values.

    Measured on 2 cores, ConvNet of width 32 on 50 digits (1e5 activations), 10 exact matching steps: one thread takes
    0.17 s. Two take 0.13 s on an idle machine but 0.6 to 7 s on a busy one, because every small operation waits for
    both.
    """
    return available_cores() if activations >= PARALLEL_FROM else 1


def run_parallel(task: Callable[[Any], T], items: Sequence[Any], workers: int | None = None) -> Iterator[tuple[int, T]]:
    """Yields (position, task(item)) as tasks finish, in forked processes; by default one process per core.

    Ranks divide the items and exchange the results, so each rank yields all results. The items must be the same on
    all ranks.

    A forked worker sees the caller's tensors without a copy. Its result is pickled, so return small values and no
    tensors: PyTorch sends tensors through files in /tmp, and a killed worker leaves those behind.
    Every task uses one thread. OpenMP hangs with more after a fork, and the number of threads changes the bits of a
    sum: a resumed run that trains only its last expert would end with other bytes.
    """

    def work(positions: Sequence[int]) -> Iterator[tuple[int, T]]:
        return _run_here(task, [items[position] for position in positions], workers)

    return ranks.divide_work(work, len(items))


def _run_here(task: Callable[[Any], T], items: Sequence[Any], workers: int | None) -> Iterator[tuple[int, T]]:
    workers = min(workers or available_cores(), len(items))
    if workers <= 1 or not sys.platform.startswith("linux"):
        for position, item in enumerate(items):
            with torch_settings(threads=1), ranks.working_alone():
                result = task(item)
            yield position, result
        return
    with BackgroundTasks() as pool:
        pool.start(task, items, workers)
        yield from pool.as_completed()


# The task and the items of a worker process; None in every other process. `_start_worker` sets it after the fork, so
# the worker inherits both without a copy and neither has to be picklable.
_work: tuple[Callable[[Any], Any], Sequence[Any]] | None = None


def _start_worker(parent: int, task: Callable[[Any], Any], items: Sequence[Any]) -> None:
    global _work
    _work = task, items
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ranks.exit_with_parent(parent)
    torch.set_num_threads(1)


def _run_item(position: int) -> Any:
    assert _work is not None
    task, items = _work
    with ranks.working_alone():
        return task(items[position])


class BackgroundTasks:
    """Runs tasks in forked processes while the caller does other work; leaving the block ends them."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._futures: dict[Future[Any], int] = {}

    def start(self, task: Callable[[Any], Any], items: Sequence[Any], workers: int) -> None:
        """Starts `task(item)` for all items, at most `workers` at a time. Same restrictions as `run_parallel`."""
        assert self._pool is None, "start was called before"
        fork = multiprocessing.get_context("fork")
        self._pool = ProcessPoolExecutor(workers, fork, _start_worker, (os.getpid(), task, items))
        with warnings.catch_warnings():
            # Python warns about a fork beside threads. A worker takes none of the parent's locks: it never prints.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._futures = {self._pool.submit(_run_item, position): position for position in range(len(items))}

    def completed(self) -> Iterator[tuple[int, Any]]:
        """Yields (position, result) of the tasks that ended since the last call; does not wait."""
        for future in [future for future in self._futures if future.done()]:
            yield self._futures.pop(future), future.result()

    def as_completed(self) -> Iterator[tuple[int, Any]]:
        """Waits for all other tasks and yields (position, result) as they end."""
        for future in as_completed(list(self._futures)):
            yield self._futures.pop(future), future.result()

    def pending(self) -> list[int]:
        """Returns the positions of the tasks whose result was not yielded yet."""
        return list(self._futures.values())

    def cancel(self) -> None:
        """Cancels the tasks that no worker has started."""
        self._futures = {future: position for future, position in self._futures.items() if not future.cancel()}

    def __enter__(self) -> BackgroundTasks:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown(cancel_futures=True)
