"""Progress on stderr: a live bar on a terminal, else a plain line now and then."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tadperf.compute import ranks
from tadperf.progress import Progress, silent

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

PLAIN_EVERY = 10.0  # seconds between two plain lines of one stage


@contextlib.contextmanager
def display(quiet: bool) -> Iterator[Progress]:
    """The progress to hand to a stage; the live bar is taken away when the block is left."""
    if quiet or ranks.rank():
        yield silent
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bars() as bars, choices(lambda text: bars.console.print(text, markup=False, highlight=False)):
            yield Live(bars)
    else:
        with choices(lambda text: print(text, file=sys.stderr, flush=True)):
            yield Plain()


@contextlib.contextmanager
def choices(say: Callable[[str], object]) -> Iterator[None]:
    """Says what tadperf logs, such as what "auto" chose."""

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    handler, logger = Said(), logging.getLogger("tadperf")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class Plain:
    """A line when a stage begins, ends, and about every 10 s between."""

    def __init__(self) -> None:
        self.started: dict[str, tuple[float, int]] = {}
        self.printed = 0.0

    def __call__(self, stage: str, done: int, total: int, **values: object) -> None:
        now = time.monotonic()
        first = stage not in self.started
        start, offset = self.started.setdefault(stage, (now, done))
        if not first and done < total and now - self.printed < PLAIN_EVERY:
            return
        self.printed = now
        line = f"{stage} {done}/{total} {figures(values)}".rstrip()
        if done >= total:
            line += f" in {duration(now - start)}"
        elif done > offset:
            line += f", {duration((now - start) / (done - offset) * (total - done))} left"
        print(line, file=sys.stderr, flush=True)


class Live:
    """One bar per stage."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, **values: object) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=total, figures="")
        self.bars.update(self.tasks[stage], completed=done, total=total, figures=figures(values))


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Bars(*columns, TimeRemainingColumn(), TextColumn("{task.fields[figures]}"), console=Console(stderr=True))


def figures(values: dict[str, object]) -> str:
    """ "loss=0.312 lr=0.0214": floats to three figures."""
    return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())


def duration(seconds: float) -> str:
    """ "0.8 s", "42 s", "3 min 05 s", "2 h 07 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"
