"""The command line with unusual outputs: closed, full, not UTF-8, narrow, without colour."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

TADPERF = [sys.executable, "-m", "tadperf"]
ESCAPE = "\x1b"


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a shell line in which `$T` stands for tadperf. The exit code is that of tadperf."""
    environment = {**os.environ, "T": " ".join(TADPERF), **environment}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, timeout=120)


COMMANDS = ["info", "info --json", "config --quiet", "bench --list --device cpu", "distill --help"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("reader", ["head -c 1", "true"])
def test_a_reader_that_leaves_early_is_no_error(tmp_path, command, reader):
    done = shell(f"$T {command} | {reader} >/dev/null; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")


def test_another_pipe_that_breaks_is_a_failure(tadperf, monkeypatch):
    from tadperf.config import merge

    def breaks(config):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(merge, "to_toml", breaks)
    code, _, err = tadperf("config", "--quiet")
    assert code == 1
    assert "failed: BrokenPipeError" in err


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams(tmp_path, closed):
    assert shell(f"$T info {closed}", tmp_path).returncode == 0
    wrong = shell(f"$T distill --ipc 0 {closed}", tmp_path)
    assert wrong.returncode == 2
    assert wrong.stdout == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_a_failure_of_one_line(tmp_path):
    done = shell("$T config --quiet >/dev/full", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(b"tadperf: failed: OSError: [Errno 28]")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "settings", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_names_that_the_encoding_lacks(tmp_path, settings):
    done = shell("$T config --set data.path=größe --json --quiet", tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    assert (
        json.loads(done.stdout.decode("utf-8"))["data"]["path"].encode("utf-8", "surrogateescape") == "größe".encode()
    )
    done = shell("$T config --set data.path=größe --quiet", tmp_path, **settings)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"gr" in done.stdout
    done = shell("$T distill größe", tmp_path, **settings)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


def test_deviations_without_a_plus_minus_sign(monkeypatch):
    from tadperf.cli import tables

    class Ascii:
        encoding = "ascii"

    scores = {"mean": 0.5, "std": 0.01, "runs": [0.49, 0.51]}
    assert tables._score(scores)[0] == "50.0 ± 1.0"
    monkeypatch.setattr(tables.sys, "stdout", Ascii())
    assert tables._score(scores)[0] == "50.0 +- 1.0"


def on_terminal(arguments: list[str], folder: Path, **environment: str) -> str:
    """Runs tadperf on a terminal and returns what it shows."""
    reader, writer = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", **environment}
    process = subprocess.Popen([*TADPERF, *arguments], cwd=folder, env=environment, stdout=writer, stderr=writer)
    os.close(writer)
    text = b""
    while select.select([reader], [], [], 60)[0]:
        try:
            part = os.read(reader, 100_000)
        except OSError:  # Linux: the last writer has closed the terminal
            break
        text += part
    os.close(reader)
    assert process.wait(timeout=60) == 0, text
    return text.decode()


def test_a_narrow_terminal_shows_every_word(tmp_path):
    shown = on_terminal(["info"], tmp_path, COLUMNS="40")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert max(map(len, lines)) <= 40
    letters = "".join("".join(lines).split())
    assert all(name in letters for name in ("per_sample", "norm_relu_pool", "torch"))


def test_no_color(tmp_path):
    assert ESCAPE in on_terminal(["info"], tmp_path)
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|38;)", on_terminal(["info"], tmp_path, NO_COLOR="1"))
