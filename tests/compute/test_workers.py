"""Tasks in forked processes: their results and failures. No process may remain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tadperf.compute import workers
from tadperf.compute.workers import BackgroundTasks, run_parallel
from tadperf.kernels import implementations, per_sample
from tadperf.kernels.dispatch import call_counts

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tasks are forked on Linux only")


def alive(pid: int) -> bool:
    """Returns whether a process runs. A zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Waits until the condition is true; returns its last value."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def children() -> set[int]:
    """Returns the running children of this process."""
    running = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            running.add(int(stat.parent.name))
    return running


@pytest.mark.parametrize("workers", [None, 1, 2, 5])
def test_every_item_is_processed_once_with_its_position(workers):
    items = [3, 1, 4, 1, 5]
    assert sorted(run_parallel(lambda item: item * item, items, workers)) == list(enumerate([9, 1, 16, 1, 25]))
    assert list(run_parallel(lambda item: item, [], workers)) == []


@linux
@pytest.mark.parametrize("workers", [1, 2])
def test_the_operators_that_a_worker_calls_are_counted_in_the_parent(workers):
    def task(item: int) -> int:
        for _ in range(item):
            per_sample(torch.zeros(2, 3), torch.tensor([0, 1]))
        return item

    before = call_counts()
    per_sample(torch.zeros(2, 3), torch.tensor([0, 1]))  # a worker inherits this count, and must not add it again
    assert sorted(run_parallel(task, [1, 2, 4], workers)) == [(0, 1), (1, 2), (2, 4)]
    implementation = implementations()["per_sample"]["cpu"]
    assert call_counts() - before == {("per_sample", implementation): 8}


def test_results_arrive_as_tasks_finish_in_other_processes():
    def task(seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    results = list(run_parallel(task, [1.0, 0.0], 2))
    assert [position for position, _ in results] == [1, 0]
    assert os.getpid() not in {pid for _, pid in results}


@linux
def test_workers_use_closures_and_tensors_without_a_copy():
    big = torch.ones(64 << 20, dtype=torch.uint8)

    def task(item: int) -> tuple[int, int, int]:
        before = resident()
        return item + len(big), big.data_ptr(), resident() - before

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for position, (value, pointer, grown) in run_parallel(task, [1, 2], 2):
        assert value == (64 << 20) + position + 1
        assert pointer == big.data_ptr()
        assert grown < 8 << 20


def fit(seed: int) -> bytes:
    """Trains a small network for a few steps. Its sums are long enough for PyTorch to use several threads."""
    torch.manual_seed(seed)
    x, weight = torch.randn(256, 300), torch.randn(300, 200, requires_grad=True)
    for _ in range(3):
        (grad,) = torch.autograd.grad((x @ weight).tanh().square().sum(), weight)
        weight = (weight - 1e-3 * grad).detach().requires_grad_()
    return weight.detach().numpy().tobytes()


@linux
def test_bits_do_not_depend_on_the_number_of_workers_or_tasks():
    before = torch.get_num_threads()
    two = dict(run_parallel(fit, [0, 1, 2], 2))
    assert dict(run_parallel(fit, [0, 1, 2], 1)) == two
    assert dict(run_parallel(fit, [2])) == {0: two[2]}  # as in a resumed run: one task alone
    assert torch.get_num_threads() == before


@linux
@pytest.mark.timeout(60)
def test_workers_do_not_hang_after_threads_ran_in_the_parent(monkeypatch):
    """OpenMP hangs in a forked worker with several threads. Four cores and two tasks once caused this."""
    before = torch.get_num_threads()
    monkeypatch.setattr(workers, "available_cores", lambda: 4)
    torch.set_num_threads(2)
    x = torch.randn(1500, 1500)
    total = (x @ x).sum()
    assert total.isfinite()
    threads = dict(run_parallel(lambda _: ((x @ x).sum(), torch.get_num_threads())[1], [0, 1]))
    assert threads == {0: 1, 1: 1}
    torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_task_raises_its_error_and_leaves_no_worker(workers):
    def task(item: int) -> int:
        if item == 1:
            raise ValueError("label 12 is missing")
        time.sleep(0.01)
        return item

    before = children()
    with pytest.raises(ValueError, match="label 12 is missing"):
        list(run_parallel(task, list(range(6)), workers))
    assert wait_for(lambda: children() <= before)
    assert len(list(run_parallel(lambda item: item, [1, 2], workers))) == 2  # the next call works


@linux
@pytest.mark.timeout(60)
def test_a_killed_worker_raises_an_error():
    def task(item: int) -> int:
        if item == 0:
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does if memory runs out
        time.sleep(0.2)
        return item

    before = children()
    with pytest.raises(BrokenProcessPool, match="terminated abruptly"):
        list(run_parallel(task, list(range(4)), 2))
    assert wait_for(lambda: children() <= before)


@linux
def test_an_early_close_or_an_interrupt_ends_the_workers():
    before = children()

    def task(item: int) -> int:
        time.sleep(0 if item == 0 else 60)
        return item

    start = time.monotonic()
    running = cast(Generator[tuple[int, int], None, None], run_parallel(task, [0, 1, 2], 2))
    assert next(running) == (0, 0)
    assert children() - before
    running.close()
    assert wait_for(lambda: children() <= before)

    running = cast(Generator[tuple[int, int], None, None], run_parallel(task, [0, 1, 2], 2))
    assert next(running) == (0, 0)
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt)
    assert wait_for(lambda: children() <= before)
    assert time.monotonic() - start < 30


PARENT = """
import os, sys, time
from tadperf.compute.workers import run_parallel
def task(item):
    with open(f"{sys.argv[1]}/{item}", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(120)
list(run_parallel(task, [0, 1], 2))
"""


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, number):
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    accept_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore SIGINT
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=accept_interrupts)
    try:
        notes = [tmp_path / "0", tmp_path / "1"]
        assert wait_for(lambda: all(note.exists() and note.read_text() for note in notes), 60)
        workers = [int(note.read_text()) for note in notes]
        assert all(alive(pid) for pid in workers)
        parent.send_signal(number)
        assert parent.wait(30) != 0
        assert wait_for(lambda: not any(alive(pid) for pid in workers))
    finally:
        parent.kill()
        parent.wait()


@linux
def test_background_tasks_run_and_can_be_cancelled(tmp_path):
    """Tasks run while the caller works. `cancel` drops those not yet started; the end of the block ends the rest."""
    before = children()

    def task(item: int) -> int:
        while item and not (tmp_path / str(item)).exists():
            time.sleep(0.01)
        return item * item

    results: list[tuple[int, int]] = []
    with BackgroundTasks() as pool:
        assert list(pool.completed()) == []
        pool.start(task, [0, 1, 2, 3, 4, 5], 1)
        assert wait_for(lambda: results.extend(pool.completed()) or bool(results))
        pool.cancel()  # the worker runs the next task and has up to two more in its queue
        pending = pool.pending()
        assert pending[0] == 1
        assert len(pending) <= 3
        for position in pending:
            (tmp_path / str(position)).touch()
        results += pool.as_completed()
        assert results == [(position, position**2) for position in (0, *pending)]
        assert not pool.pending()
    assert wait_for(lambda: children() <= before)

    def interrupted() -> None:
        with BackgroundTasks() as pool:
            pool.start(task, [7, 8, 9], 2)
            assert wait_for(lambda: children() > before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert wait_for(lambda: children() <= before)


@linux
def test_the_error_of_a_background_task_is_raised_with_its_result():
    def task(item: int) -> int:
        raise ValueError("label 12 is missing")

    with BackgroundTasks() as pool:
        pool.start(task, [1], 1)
        with pytest.raises(ValueError, match="label 12 is missing"):
            list(pool.as_completed())


def differentiate(item: int) -> float:
    x = torch.ones(3, requires_grad=True)
    return float(torch.autograd.grad((x * x).sum() * item, x)[0].sum())


def fail_in_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes autograd fail in forked processes, as it does after a backward pass if PyTorch sees a GPU."""
    parent, grad = os.getpid(), torch.autograd.grad

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if os.getpid() != parent:
            raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing")
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    workers._warn_of_autograd_threads.cache_clear()


@linux
def test_tasks_run_in_this_process_if_autograd_fails_in_forked_ones(monkeypatch):
    fail_in_child(monkeypatch)
    before = torch.get_num_threads()
    with pytest.warns(RuntimeWarning, match="set CUDA_VISIBLE_DEVICES to an empty value"):
        assert list(run_parallel(differentiate, [1, 2, 3], 2)) == [(0, 6.0), (1, 12.0), (2, 18.0)]
    threads = [count for _, count in run_parallel(lambda _: torch.get_num_threads(), [1, 2], 2)]
    assert (threads, torch.get_num_threads()) == ([1, 1], before)
    with BackgroundTasks() as pool:
        pool.start(differentiate, [1, 2], 2)
        assert (list(pool.completed()), pool.pending()) == ([], [])
        pool.cancel()
        assert list(pool.as_completed()) == []


@linux
def test_a_gpu_that_autograd_has_not_seen_does_not_prevent_forks(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    pids = {pid for _, pid in run_parallel(lambda _: os.getpid(), [1, 2], 2)}
    assert os.getpid() not in pids


@pytest.mark.parametrize(
    ("given", "threads"), [(None, 4), ("1", 1), ("3", 3), ("9", 4), ("2,1", 2), ("", 4), ("0", 4), ("many", 4)]
)
def test_a_large_step_takes_all_cores_but_no_more_threads_than_the_user_allows(monkeypatch, given, threads):
    """Two jobs of two threads each on two cores took four times as long as two jobs of one thread."""
    monkeypatch.setattr(workers, "available_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS") if given is None else monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert workers.threads_for(workers.PARALLEL_FROM) == threads
    assert workers.threads_for(workers.PARALLEL_FROM - 1) == 1
