"""Plain progress lines."""

from __future__ import annotations

import os
import pty
import select
import sys

import pytest

from tadperf.cli import progress


def test_plain_lines_come_at_the_start_now_and_then_and_at_the_end(capsys, monkeypatch):
    show = progress.Plain()
    show("experts", 0, 4)
    show("experts", 1, 4, loss=0.123456)  # less than 10 s later
    show("experts", 4, 4, loss=0.5)
    assert [line.split(" in ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "experts 0/4",
        "experts 4/4 loss=0.5",
    ]
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)
    show("matching", 10, 30)  # resumed at 10: the time left follows what this process has done
    show.started["matching"] = (show.started["matching"][0] - 100, 10)
    show("matching", 20, 30, step=3)
    assert capsys.readouterr().err.splitlines()[1] == "matching 20/30 step=3, 1 min 40 s left"


def test_quiet_and_other_outputs(capsys):
    with progress.display(quiet=True) as show:
        show("data", 1, 1)
    assert capsys.readouterr().err == ""
    with progress.display(quiet=False) as show:  # captured: not a terminal
        assert isinstance(show, progress.Plain)


def test_the_live_bar_on_a_terminal(monkeypatch):
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with progress.display(quiet=False) as show:
            show("matching", 0, 5)
            show("matching", 5, 5, loss=0.25)
        terminal.flush()
        text = ""
        while "5/5" not in text and select.select([reader], [], [], 5)[0]:
            text += os.read(reader, 100_000).decode(errors="replace")
    os.close(reader)
    assert "matching" in text
    assert "5/5" in text
    assert "loss=0.25" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.84, "0.8 s"), (42, "42 s"), (185, "3 min 05 s"), (59.7, "1 min 00 s"), (7620, "2 h 07 min")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
