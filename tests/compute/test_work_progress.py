"""Progress within a stage: the images that networks have trained on, in this process and in workers."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tadperf.compute import work_progress
from tadperf.compute.work_progress import SharedCount, add_tested, add_trained, counting, reporting, work
from tadperf.compute.workers import run_parallel
from tadperf.nets.training import Recipe, accuracy, fit

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tasks are forked on Linux only")
RECIPE = Recipe(epochs=3, batch=4, lr=0.1, momentum=0.0, weight_decay=0.0, augment="none")


@pytest.fixture
def fast_reports(monkeypatch):
    monkeypatch.setattr(work_progress, "START_DELAY", 0.1)
    monkeypatch.setattr(work_progress, "INTERVAL", 0.02)


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, stage: str, done: int, total: int, **values: object) -> None:
        self.calls.append((stage, done, total))


def slow_task(images: int) -> int:
    for _ in range(images):
        time.sleep(0.05)
        add_trained(1)
    add_tested(3)
    return os.getpid()


def test_nothing_is_counted_by_default():
    assert work_progress._count is None
    add_trained(5)
    add_tested(5)


def test_counts_of_a_training_and_its_test_equal_the_work():
    images, labels = torch.randn(10, 1, 8, 8), torch.arange(10) % 3
    units: list[int] = []
    with counting(units.append):
        module = fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), images, labels, RECIPE, 0)
        accuracy(module, images, labels)
    assert units == [12, 12, 6] * 3 + [10]  # batches of 4, 4 and 2 images
    assert sum(units) == work(3 * 10, 10)
    assert work_progress._count is None


@linux
def test_workers_are_reported_while_they_train(fast_reports):
    record = Recorder()
    with reporting(record, "stage", work(27, 9)):
        results = dict(run_parallel(slow_task, [9, 9, 9], workers=2))
    done = [done for _, done, _ in record.calls]
    assert os.getpid() not in results.values()
    assert {(stage, total) for stage, _, total in record.calls} == {("stage", 30)}
    assert done == [*sorted(set(done[:-1])), 30]
    assert len(done) >= 4
    assert work_progress._count is None


@linux
def test_no_addition_of_a_process_is_lost(monkeypatch):
    monkeypatch.setattr(work_progress, "SLOTS", 16)
    count = SharedCount()

    def add(units: int) -> None:
        for _ in range(1000):
            count.add(units)

    list(run_parallel(add, [1, 2, 3, 4], workers=4))
    assert count.total() == 10_000


def test_a_task_in_this_process_is_reported(fast_reports):
    record = Recorder()
    with reporting(record, "stage", work(9, 3)):
        slow_task(9)
    assert 0 <= record.calls[0][1] < 9
    assert record.calls[-1] == ("stage", 10, 10)


def test_short_blocks_report_nothing_and_end_at_once(monkeypatch):
    monkeypatch.setattr(work_progress, "START_DELAY", 60.0)
    record, start = Recorder(), time.monotonic()
    with reporting(record, "stage", work(1)):
        slow_task(1)
    assert record.calls == []
    assert time.monotonic() - start < 30


def test_an_error_ends_the_reporter_but_not_the_stage(fast_reports):
    record, before = Recorder(), threading.active_count()

    def fail() -> None:
        with reporting(record, "stage", work(10)):
            add_trained(4)
            time.sleep(0.3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert record.calls == [("stage", 4, 10)]
    assert threading.active_count() == before
    assert work_progress._count is None


def test_the_work_of_other_processes_is_added(fast_reports):
    record = Recorder()
    with reporting(record, "stage", work(20), lambda: work(7)):
        add_trained(3)
        time.sleep(0.3)
    assert record.calls == [("stage", 10, 20), ("stage", 20, 20)]


@linux
def test_a_killed_worker_leaves_no_file_and_its_error_ends_the_reporter(fast_reports):
    def shared_files() -> set[str]:
        return {str(path) for folder in ("/dev/shm", "/tmp") for path in Path(folder).glob("*torch*")}

    def die(item: int) -> None:
        add_trained(1)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        with reporting(record, "stage", work(9)):
            list(run_parallel(die, [1, 2], workers=2))

    before, threads, record = shared_files(), threading.active_count(), Recorder()
    with pytest.raises(Exception, match="terminated abruptly"):
        run()
    assert shared_files() == before
    assert threading.active_count() == threads
    assert all(done < total for _, done, total in record.calls)
