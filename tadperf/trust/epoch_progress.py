"""Reports the epochs of networks that train in other processes."""

from __future__ import annotations

import mmap
import threading

import numpy as np

from tadperf.progress import Progress

INTERVAL = 1.0  # seconds between two reports
# Seconds before the first report. Workers are forked in this time, while the thread waits and holds no lock.
START_DELAY = 2.0


class EpochProgress:
    """Reports how many epochs all networks together have finished, about once per second.

    Inside the `with` block, forked workers call `epoch_done`, which counts in shared memory. A thread of this process
    reads the counts.
    """

    def __init__(self, progress: Progress, stage: str, networks: int, epochs: int) -> None:
        self._progress, self._stage, self._total = progress, stage, networks * epochs
        self._epochs = epochs
        self._counts = np.frombuffer(mmap.mmap(-1, 8 * networks), dtype=np.int64)  # anonymous: no file stays behind
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._reported = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def epoch_done(self, network: int) -> None:
        """Counts one epoch; any process may call this."""
        self._counts[network] += 1

    def network_done(self, network: int) -> None:
        """Counts all epochs of a network as done, even if another rank trained it, and reports."""
        self._counts[network] = self._epochs
        self._report()

    def _report(self) -> None:
        with self._lock:
            done = int(self._counts.sum())
            if done > self._reported:
                finished = int((self._counts == self._epochs).sum())
                self._progress(self._stage, done, self._total, finished=f"{finished} of {len(self._counts)}")
                self._reported = done

    def _watch(self) -> None:
        delay = START_DELAY
        while not self._stop.wait(delay):
            self._report()
            delay = INTERVAL

    def __enter__(self) -> EpochProgress:
        self._progress(self._stage, 0, self._total)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
