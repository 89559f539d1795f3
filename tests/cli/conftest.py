"""Fixtures: a function that runs the command line in this process, and the options of a job that takes seconds."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tadperf.compute import allocator, device

# A ConvNet of 8 channels on the built-in digits: about 3 s with the start of Python.
TINY = [
    "--ipc=1",
    "--repeats=2",
    "--device=cpu",
    *(
        f"--set={s}"
        for s in (
            "net.width=8",
            "net.depth=1",
            "experts.count=2",
            "experts.epochs=3",
            "match.iterations=6",
            "match.check_every=3",
            "match.steps=2",
            "match.max_start=1",
            "match.expert_epochs=1",
            "evaluate.epochs=3",
            "evaluate.full_epochs=1",
            "evaluate.full_repeats=1",
            "trust.rounds=1",
            "trust.proxies=2",
            "trust.epochs=2",
        )
    ),
]


@pytest.fixture
def tiny() -> list[str]:
    """Returns the options of a job that takes seconds."""
    return TINY


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def tadperf(monkeypatch, capfd, tmp_path) -> Callable[..., Outcome]:
    """Returns a function: tadperf("distill", "--ipc", "0") runs in an empty folder and returns exit code and output."""
    from tadperf.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: None)  # the setting would stay for all later tests
    monkeypatch.setattr(device, "hide_gpus", lambda: None)  # this one too

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["tadperf", *map(str, arguments)])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as end:
                app.main()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        assert isinstance(end.value.code, int)
        return Outcome(end.value.code, *capfd.readouterr())

    return run
