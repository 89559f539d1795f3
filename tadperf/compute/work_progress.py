"""Reports how many images networks have trained on, while they train in this process and in forked workers.

Training loops call `add_trained` and `add_tested`, which do nothing by default. Inside `reporting` they count in memory
that forked processes share, and a thread of the parent reports the sum.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator

import numpy as np

from tadperf.progress import Progress

INTERVAL = 1.0  # seconds between two reports
# Seconds before the first report, so that short tasks report nothing. Workers are forked in this time, while the thread
# waits and holds no lock.
START_DELAY = 2.0
# Units of work of an image. One that is only tested has no backward pass, which takes about twice the forward pass.
TRAINED, TESTED = 3, 1
SLOTS = 4096  # processes that can count at the same time

# Adds units of work; None if nobody counts. Forked workers inherit it.
_count: Callable[[int], None] | None = None


def add_trained(images: int) -> None:
    """Counts images of a training step. On CUDA the step may still wait for the device."""
    if _count is not None:
        _count(TRAINED * images)


def add_tested(images: int) -> None:
    """Counts images that a network has classified without a gradient."""
    if _count is not None:
        _count(TESTED * images)


def add_processed(images: int) -> None:
    """Counts images, or samples, of a step that trains no network. One counts as much as a trained image."""
    add_trained(images)


def work(trained: int, tested: int = 0) -> int:
    """Returns the units of work of training on some images and testing some."""
    return TRAINED * trained + TESTED * tested


@contextlib.contextmanager
def counting(count: Callable[[int], None]) -> Iterator[None]:
    """Inside the block, `count` gets the units of every batch that this process, or a worker forked here, works on."""
    global _count
    _count, before = count, _count
    try:
        yield
    finally:
        _count = before


class SharedCount:
    """A sum to which forked processes add. Each process has its own slot, so no addition is lost."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, 16 * SLOTS)  # anonymous: a killed process leaves no file behind
        self._owners, self._counts = np.frombuffer(memory, dtype=np.int64).reshape(2, SLOTS)

    def add(self, units: int) -> None:
        """Adds to the sum; any process that was forked after this object was made may call it."""
        process = os.getpid()
        slot = process % SLOTS
        while self._owners[slot] not in (0, process):  # a process whose id is equal modulo SLOTS
            slot = (slot + 1) % SLOTS
        self._owners[slot] = process
        self._counts[slot] += units

    def total(self) -> int:
        """Returns the sum."""
        return int(self._counts.sum())


@contextlib.contextmanager
def reporting(progress: Progress, stage: str, total: int, elsewhere: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Inside the block, a thread reports the trained or processed images as a stage, about once per second.

    total: the units of work (`work`) of the block, and of other processes that it waits for. elsewhere: returns the
    units that those have done. Of several ranks, each one reports its own work.
    The first report comes after 2 s. A block that ends earlier reports nothing. The last report says that all work is
    done, unless an error ends the block.
    """
    count, stop, images, last = SharedCount(), threading.Event(), -(-total // TRAINED), -1

    def watch() -> None:
        nonlocal last
        delay = START_DELAY
        while not stop.wait(delay):
            done = (count.total() + elsewhere()) // TRAINED
            if last < done < images:
                last = done
                progress(stage, done, images)
            delay = INTERVAL

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        with counting(count.add):
            yield
    finally:
        stop.set()
        thread.join()
    if last >= 0:
        progress(stage, images, images)
