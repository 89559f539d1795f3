"""Progress on stderr: plain lines and live bars."""

from __future__ import annotations

import os
import pty
import select
import sys

import pytest

from tadperf.cli import progress


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_plain_lines_come_at_the_start_at_the_end_and_every_10_seconds(capsys, monkeypatch):
    show = progress.PlainProgress()
    show("experts", 0, 4)
    show("experts", 1, 4, loss=0.123456)  # less than 10 s later
    show("experts", 4, 4, loss=0.5)
    assert [line.split(", took ")[0] for line in lines(capsys)] == ["experts 0/4", "experts 4/4, loss 0.5"]
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0.0)
    show("matching", 10, 30)  # resumed at 10: the time left depends only on what this process has done
    show.clocks["matching"].start -= 100
    show("matching", 20, 30, step=3)
    assert lines(capsys)[1] == "matching 20/30, step 3, 1 min 40 s left"


def test_a_stage_that_runs_again_has_a_new_clock(capsys):
    show = progress.PlainProgress()
    show("trust:neighbours", 0, 2)
    show.clocks["trust:neighbours"].start -= 100
    show("trust:neighbours", 2, 2)
    show("trust:neighbours", 0, 2)
    show("trust:neighbours", 2, 2)
    words = "trust: neighbours"
    assert lines(capsys) == [
        f"{words} 0/2",
        f"{words} 2/2, took 1 min 40 s",
        f"{words} 0/2",
        f"{words} 2/2, took 0.0 s",
    ]


def test_a_stage_within_a_stage_has_lines_after_10_seconds_only(capsys):
    show = progress.PlainProgress()
    show("experts", 0, 4)
    show("experts:training", 100, 400)
    show("experts:training", 400, 400)
    assert lines(capsys) == ["experts 0/4"]
    show("experts:training", 100, 400)
    show.printed -= 10
    show.clocks["experts:training"].start -= 10
    show("experts:training", 200, 400, finished="1 of 4")
    show("experts:training", 300, 400)
    show.printed -= 10
    show("experts:training", 400, 400)
    assert lines(capsys) == ["images trained for experts 200/400, finished 1 of 4, 20 s left"]


def test_figures_are_words_and_numbers():
    values = {"trusted": 0.9666, "train_accuracy": 0.5, "diversity": float("nan"), "round": 2}
    assert progress.figures(values) == "share trusted 0.967, train accuracy 0.5, round 2"


def test_a_run_continues_without_messages_if_nobody_reads_stderr(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        with progress.display(quiet=False) as show:
            show("experts", 0, 2)
            show("experts", 2, 2)


def test_quiet_and_other_outputs(capsys):
    with progress.display(quiet=True) as show:
        show("data", 1, 1)
    assert capsys.readouterr().err == ""
    with progress.display(quiet=False) as show:  # stderr is captured, so it is not a terminal
        assert isinstance(show, progress.PlainProgress)


def test_the_live_bar_on_a_terminal(monkeypatch):
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with progress.display(quiet=False) as show:
            show("matching", 5, 5)
            show("matching", 0, 5)  # the stage runs again
            show("matching", 5, 5, loss=0.25)
        terminal.flush()
        text = ""
        while "5/5" not in text and select.select([reader], [], [], 5)[0]:
            text += os.read(reader, 100_000).decode(errors="replace")
    os.close(reader)
    assert "matching" in text
    assert "5/5" in text
    assert "loss 0.25" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.84, "0.8 s"), (42, "42 s"), (185, "3 min 05 s"), (59.7, "1 min 00 s"), (7620, "2 h 07 min")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
