"""Runs independent tasks on the cores of one machine, and over all ranks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from typing import Any, TypeVar

import torch

from tadperf.compute import ranks
from tadperf.compute.torch_settings import torch_settings
from tadperf.kernels.dispatch import add_call_counts, call_counts

T = TypeVar("T")
PARALLEL_FROM = 1_000_000  # activations of a step's widest layer; not tuned beyond the figures of `threads_for`


def available_cores() -> int:
    """Returns the number of cores that this process may use: an equal share if several ranks run on the machine."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count // ranks.local_world_size())


def threads_for(activations: int) -> int:
    """Returns the number of threads for steps whose widest layer has `activations` values: at most OMP_NUM_THREADS.

    Measured on 2 cores, ConvNet of width 32 on 50 digits (1e5 activations), 10 exact matching steps: one thread takes
    0.17 s. Two take 0.13 s on an idle machine but 0.6 to 7 s on a busy one, because every small operation waits for
    both.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    most = int(given) if given.isdecimal() and int(given) > 0 else sys.maxsize
    return min(most, available_cores()) if activations >= PARALLEL_FROM else 1


def run_parallel(task: Callable[[Any], T], items: Sequence[Any], workers: int | None = None) -> Iterator[tuple[int, T]]:
    """Yields (position, task(item)) as tasks finish, in forked processes; by default one process per core.

    Ranks divide the items and exchange the results, so each rank yields all results. The items must be the same on
    all ranks.

    A forked worker sees the caller's tensors without a copy. Its result is pickled, so return small values and no
    tensors: PyTorch sends tensors through files in /tmp, and a killed worker leaves those behind.
    Every task uses one thread. With more threads OpenMP hangs after a fork. The number of threads also changes the bits
    of a sum, so a resumed run that trains only its last expert would end with other bytes.
    Tasks run one after another in this process if forked processes cannot run autograd (`can_fork`).
    """

    def work(positions: Sequence[int]) -> Iterator[tuple[int, T]]:
        return _run_here(task, [items[position] for position in positions], workers)

    return ranks.divide_work(work, len(items))


def _run_here(task: Callable[[Any], T], items: Sequence[Any], workers: int | None) -> Iterator[tuple[int, T]]:
    workers = min(workers or available_cores(), len(items))
    if workers <= 1 or not can_fork():
        for position, item in enumerate(items):
            with torch_settings(threads=1), ranks.working_alone():
                result = task(item)
            yield position, result
        return
    with BackgroundTasks() as pool:
        pool.start(task, items, workers)
        yield from pool.as_completed()


def can_fork() -> bool:
    """Returns whether forked processes can run tasks: on Linux, unless autograd threads for a GPU run here.

    PyTorch starts these threads at the first backward pass of a process that sees a GPU, also for a pass on the CPU.
    Afterwards autograd raises an error in every forked process. In this case there is one warning.
    """
    if not sys.platform.startswith("linux"):
        return False
    # Does not ask whether a GPU is available: that initialises CUDA, and then forked processes cannot initialise it.
    if torch.accelerator.current_accelerator() is None or _child_can_differentiate():  # None: a build for CPUs only
        return True
    _warn_of_autograd_threads()
    return False


def _child_can_differentiate() -> bool:
    """Forks a process that runs a backward pass, and returns whether it succeeds."""
    with _ignored_fork_warning():
        child = os.fork()
    if child == 0:
        code = 1
        try:
            x = torch.ones(1, requires_grad=True)
            torch.autograd.grad(x.sum(), x)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


@contextlib.contextmanager
def _ignored_fork_warning() -> Iterator[None]:
    """Hides Python's warning about a fork of a threaded process. The children never print, so no lock blocks them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@cache  # once per process; Python's own filter would repeat the warning for every caller
def _warn_of_autograd_threads() -> None:
    warnings.warn(
        "autograd has threads for a GPU, so CPU tasks run one after another in this process; to use all cores, set "
        "CUDA_VISIBLE_DEVICES to an empty value before you start it",
        RuntimeWarning,
        stacklevel=4,
    )


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


def _run_item(position: int) -> tuple[Any, Counter[Any]]:
    """Returns the result, and the calls of operators that it took, which the parent adds to its own."""
    assert _work is not None
    task, items = _work
    before = call_counts()
    with ranks.working_alone():
        result = task(items[position])
    return result, call_counts() - before


class BackgroundTasks:
    """Runs tasks in forked processes while the caller does other work; leaving the block ends them."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._futures: dict[Future[Any], int] = {}

    def start(self, task: Callable[[Any], Any], items: Sequence[Any], workers: int) -> None:
        """Starts `task(item)` for all items, at most `workers` at a time. Same restrictions as `run_parallel`.

        Starts none if `can_fork` is false. `pending` then returns nothing, as after `cancel`.
        """
        assert self._pool is None, "start was called before"
        if not can_fork():
            return
        fork = multiprocessing.get_context("fork")
        self._pool = ProcessPoolExecutor(workers, fork, _start_worker, (os.getpid(), task, items))
        with _ignored_fork_warning():
            self._futures = {self._pool.submit(_run_item, position): position for position in range(len(items))}

    def completed(self) -> Iterator[tuple[int, Any]]:
        """Yields (position, result) of the tasks that ended since the last call; does not wait."""
        for future in [future for future in self._futures if future.done()]:
            yield self._take(future)

    def as_completed(self) -> Iterator[tuple[int, Any]]:
        """Waits for all other tasks and yields (position, result) as they end."""
        for future in as_completed(list(self._futures)):
            yield self._take(future)

    def _take(self, future: Future[Any]) -> tuple[int, Any]:
        position = self._futures.pop(future)
        result, calls = future.result()
        add_call_counts(calls)
        return position, result

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
            try:
                for process in list((self._pool._processes or {}).values()):
                    process.kill()
            finally:  # also if an interrupt arrives here
                self._pool.shutdown(cancel_futures=True)
