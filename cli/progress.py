"""Shows progress on stderr: live bars on a terminal, otherwise plain lines."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tadperf.cli import common
from tadperf.compute import ranks
from tadperf.progress import Progress, silent
from tadperf.report.words import duration

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

PLAIN_INTERVAL = 10.0  # seconds between two plain lines while a stage runs; not tuned
STAGES = {  # stage -> words for the user
    "data:normalise": "images normalised",
    "trust:nearest": "samples compared with all others",
    "matching:start": "images clustered",
    "experts:training": "images trained for experts",
    "matching:check": "images trained to check the set",
    "evaluate:training": "images trained for evaluation",
    "detector:training": "images trained for the detector",
    "decode": "decoding images",
    "resize": "resizing images",
    "trust:proxies": "images trained for proxy networks",
    "trust:neighbours": "trust: neighbours",
    "features": "features: probe and neighbours",
    "encode": "computing features",
    "trust:graph": "neighbours",
    "trust:labels": "probabilities of all labels",
}
# Stages within a stage, in images. Plain lines show them only after 10 s without a line, so a short job has none.
INNER_STAGES = {
    "data:normalise",
    "trust:proxies",
    "trust:nearest",
    "experts:training",
    "matching:start",
    "matching:check",
    "evaluate:training",
    "detector:training",
}
FIGURES = {"trusted": "share trusted", "moved": "share changed"}


@contextlib.contextmanager
def display(quiet: bool) -> Iterator[Progress]:
    """Yields the function that shows the progress of all stages inside the block.

    Says first if compiled operators are missing.
    """
    if not quiet:
        common.note_missing_operators()
    if quiet or ranks.rank():
        yield silent
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bars() as bars, log_lines(lambda text: bars.console.print(text, markup=False, highlight=False)):
            yield LiveProgress(bars)
    else:
        with log_lines(common.print_stderr):
            yield PlainProgress()


@contextlib.contextmanager
def log_lines(write: Callable[[str], object]) -> Iterator[None]:
    """Writes the messages that the library logs inside the block, such as what "auto" chose."""

    class LineHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            write(record.getMessage())

    handler, logger = LineHandler(), logging.getLogger("tadperf")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@dataclass
class Clock:
    """The time when a stage started in this process, its progress at that time, and its latest progress."""

    start: float
    first: int
    done: int


class PlainProgress:
    """Prints a line when a stage starts, when it ends, and about every 10 s in between.

    A thread may call it (`work_progress.reporting`), so a lock keeps lines whole.
    """

    def __init__(self) -> None:
        self.clocks: dict[str, Clock] = {}
        self.printed, self.lock = time.monotonic(), threading.Lock()

    def __call__(self, stage: str, done: int, total: int, **values: object) -> None:
        with self.lock:
            self._show(stage, done, total, values)

    def _show(self, stage: str, done: int, total: int, values: dict[str, object]) -> None:
        now = time.monotonic()
        clock = self.clocks.get(stage)
        is_new = clock is None or done < clock.done  # a stage that runs again, as trust does in every round
        if clock is None or is_new:
            clock = self.clocks[stage] = Clock(now, done, done)
        clock.done = done
        if stage in INNER_STAGES and done >= total:  # the stage around it has its own last line
            return
        is_edge = is_new or done >= total  # the start or the end of the stage
        if now - self.printed < PLAIN_INTERVAL and (not is_edge or stage in INNER_STAGES):
            return
        self.printed = now
        parts = [f"{stage_words(stage)} {done}/{total}", figures(values)]
        if done >= total:
            parts.append(f"took {duration(now - clock.start)}")
        elif done > clock.first:
            parts.append(f"{duration((now - clock.start) / (done - clock.first) * (total - done))} left")
        common.print_stderr(", ".join(filter(None, parts)))


class LiveProgress:
    """Shows one bar for each stage."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}
        self.done: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int, **values: object) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage_words(stage), total=total, figures="")
        elif done < self.done[stage]:
            self.bars.reset(self.tasks[stage])
        self.done[stage] = done
        shown = stage not in INNER_STAGES or done < total
        self.bars.update(self.tasks[stage], completed=done, total=total, visible=shown, figures=figures(values))


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    name, values = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[figures]}"))
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), values)
    return Bars(*columns, console=Console(stderr=True))


def stage_words(stage: str) -> str:
    """Returns the words for a stage: "trust: proxy networks" for "trust:proxies"."""
    return STAGES.get(stage, stage)


def figures(values: dict[str, object]) -> str:
    """Formats values as "loss 0.312, lr 0.0214": floats with three digits, without those that are not finite."""
    known = {k: v for k, v in values.items() if not (isinstance(v, float) and not math.isfinite(v))}
    texts = {FIGURES.get(k, k): f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in known.items()}
    return ", ".join(f"{name.replace('_', ' ')} {text}" for name, text in texts.items())
