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


CHEAP = [
    "info",
    "config digits",
    "config --list",
    "bench --list --device cpu",
    "distill digits --dry-run --device cpu",
    "",
    "--help",
    "distill --help",
]


@pytest.mark.parametrize("command", CHEAP)
def test_an_output_fits_80_columns(tadperf, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = tadperf(*command.split())
    assert code == 0, err
    assert out
    for line in out.splitlines():
        assert len(line) <= 80 or len(max(line.split(), key=len)) > 60, line  # a path in one piece
    assert ESCAPE not in out


def results() -> dict[str, object]:
    """Returns results with long class names, of the commands that take long."""
    names = ["a long class name of a bird with many words in it", "a_long_class_name_without_a_space_" * 3]
    score = {"mean": 0.5, "std": 0.1, "runs": [0.4, 0.6], "interval": [-1.063, 2.113]}
    sample = {"file": f"train/{names[1]}/photo.png", "given": names[0], "suggested": names[1], "score": 0.9}
    pair = {"kind": "leak", "exact": False, "first": sample["file"], "second": sample["file"], "similarity": 0.98}
    pair |= {"first_label": names[0], "second_label": names[1]}
    duplicates = {"in_train": 3, "different_labels": 1, "leaks": 2, "exact": 1, "threshold": 0.98, "pairs": [pair]}
    audit = {"issues": 1, "samples": 2, "noise": "symmetric:0.2", "data": "photos", "worst": [sample], "paths": {}}
    audit |= {"pairs": [{"suggested": names[0], "given": names[1], "samples": 1}], "near_duplicates": duplicates}
    audit |= {"against_clean_labels": dict.fromkeys(("view_accuracy", "coverage", "precision", "recall", "issue"), 0.9)}
    rows = dict.fromkeys(("distilled", "random"), score | {"against_distilled": {"difference": -0.1, "p": 0.04}})
    measured = {"rows": rows, "ddranking": {"lrs": score, "ars": score}}
    measured["comparison"] = {"best": "random", "gain": -0.1, "p": 0.5, "verdict": "too few runs"}
    protocol = {"protocol": "published", "ipc": 10, "repeats": 2, "networks": {"convnet": measured}}
    stages = dict.fromkeys(("data", "trust", "experts", "matching", "evaluate"), 12.0)
    disk = dict.fromkeys(("experts", "trust", "checkpoints", "distilled", "cache"), 10**9)
    estimate = {"stages": stages, "seconds": 60.0, "memory_bytes": 10**9, "cuda_bytes": 10**9, "disk": disk}
    compared = {"ipc": 10, "accuracy": {"convnet": score}, "baselines": {}, "seconds": 1e5}
    return {
        "audit": audit,
        "protocol": protocol,
        "accuracy": {"accuracy": {"resnet18bn": score}},
        "estimate": estimate | {"disk_bytes": 5 * 10**9},
        "comparison": dict.fromkeys(("on", "off", "oracle"), compared),
    }


def test_columns_of_a_benchmark_that_do_not_fit_are_shown_below():
    from tadperf.bench.operators import report

    row = dict.fromkeys(report.COLUMNS, 0.125) | {"shape": "50000x10", "dtype": "bfloat16", "provider": "inductor-max"}
    lines = report.table([row, row], report.COLUMNS, 80)
    assert max(map(len, lines)) <= 80
    assert sum(line.split()[:3] == ["shape", "dtype", "provider"] for line in lines) > 1
    words = " ".join(lines)
    assert all(column.replace("_", " ") in words for column in report.COLUMNS)
    assert len(report.table([row, row], report.COLUMNS, 300)) == 3


@pytest.mark.parametrize("name", results())
def test_a_table_with_long_names_fits_80_columns(capsys, monkeypatch, name):
    from tadperf.cli import estimate, tables

    monkeypatch.setenv("COLUMNS", "80")
    getattr(estimate if name == "estimate" else tables, f"print_{name}")(results()[name])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80


def test_a_pipe_gets_no_colours_and_progress_goes_to_stderr(tadperf):
    trust = ("trust.rounds=1", "trust.proxies=1", "trust.epochs=1")
    code, out, err = tadperf("audit", "digits", "--device=cpu", *(f"--set={field}" for field in trust))
    assert code == 0
    assert ESCAPE not in out + err
    assert "took" in err
    assert "took" not in out


def test_a_dumb_terminal_without_the_lines_of_tables(tmp_path):
    shown = on_terminal(["distill", "--dry-run", "--device=cpu"], tmp_path, TERM="dumb", PYTHONIOENCODING="ascii")
    assert ESCAPE not in shown
    assert shown.isascii()
    assert "\\u" not in shown
    assert "-------" in shown
