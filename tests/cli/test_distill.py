"""`tadperf distill` from end to end: its output, interruption and resuming, and the commands around it."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def test_the_complete_job(tadperf, tiny, tmp_path):
    """Makes one run and calls the commands that a user calls with it."""
    code, out, err = tadperf("distill", *tiny, "--out", "run", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert out.count("\n") == 1
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert "preset digits" in err
    assert re.search(r"^matching 6/6, loss .*, took ", err, re.MULTILINE)
    for name in ("config.json", "env.json", "metrics.jsonl", "distilled.safetensors", "grid.png", "DONE"):
        assert (tmp_path / "run" / name).exists(), name
    assert not list((tmp_path / "run").rglob("*.tmp"))

    again = tadperf("distill", "--resume", "--out", "run")  # finished: the result is printed again, as a table
    assert again.code == 0
    rows = re.findall(r"^ ?(\S.*?)  +(\d+\.\d)(?: ± \d+\.\d)? +(\d+) *$", again.out, re.MULTILINE)
    scores = [*result["accuracy"].values(), *result["baselines"].values()]
    assert sorted((f"{100 * s['mean']:.1f}", str(len(s["runs"]))) for s in scores) == sorted(row[1:] for row in rows)
    assert f"tadperf.load({str(tmp_path / 'run' / 'distilled.safetensors')!r})" in again.out
    assert "ds.accuracy(net, 'digits')" in again.out

    refused = tadperf("distill", "--resume", "--out", "run", "--ipc", "2")
    assert refused.code == 2
    assert refused.err.startswith("tadperf: --ipc: 2: the run in run was started with 1")

    evaluated = tadperf("evaluate", "run", "--repeats", "1", "--json")  # the file knows its data
    assert evaluated.code == 0, evaluated.err
    assert len(json.loads(evaluated.out)["accuracy"]["convnet"]["runs"]) == 1
    assert "%" in tadperf("evaluate", "run/distilled.safetensors", "digits", "--repeats", "1", "--quiet").out

    compared = tadperf("evaluate", "run", "--protocol", "hard", "--repeats", "2", "--quiet")
    assert (compared.code, compared.err) == (0, "")
    for text in ("k-centre coreset", "no verdict: 2 runs cannot show a difference", "DD-Ranking: LRS 0."):
        assert text in compared.out

    shown = tadperf("show", "run/distilled.safetensors", "--out", "picture.png")
    assert shown.out == "picture.png\n"
    assert (tmp_path / "picture.png").read_bytes() == (tmp_path / "run" / "grid.png").read_bytes()

    reused = tadperf("distill", *tiny, "--out", "second", "--experts", "run", "--quiet")
    assert (reused.code, reused.err) == (0, "")
    assert (tmp_path / "second" / "distilled.safetensors").read_bytes() == (
        tmp_path / "run" / "distilled.safetensors"
    ).read_bytes()


def test_experts_alone(tadperf, tiny):
    options = [option for option in tiny if not option.startswith(("--ipc", "--repeats"))]
    code, out, err = tadperf("experts", *options, "--out", "run", "--json", "--quiet")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["experts"] == 2
    assert len(list(Path(result["path"]).glob("*.safetensors"))) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_says_which_file_and_how_to_continue(tadperf, tiny, monkeypatch, number):
    from tadperf.pipeline import distill

    def fails(task, run, progress):
        raise OSError(number, os.strerror(number), "run/experts/0.safetensors")

    monkeypatch.setattr(distill, "distill_task", fails)
    code, out, err = tadperf("distill", *tiny, "--out", "run", "--quiet")
    assert (code, out) == (1, "")
    remedy = "check the disk and its permissions" if number == errno.EIO else "free some space"
    hint = "continue with: tadperf distill --resume --out run"
    assert err == f"tadperf: run/experts/0.safetensors: {os.strerror(number)}; {remedy}; {hint}\n"


def test_another_system_error_of_a_run_is_a_failure(tadperf, tiny, monkeypatch):
    from tadperf.pipeline import distill

    def fails(task, run, progress):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(distill, "distill_task", fails)
    code, _, err = tadperf("distill", *tiny, "--out", "run", "--quiet")
    assert code == 1
    assert err.startswith("tadperf: failed: PermissionError: ")


def hear_interrupts() -> None:
    """A shell may start these tests as a background job, which ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_continue_and_does(tadperf, tiny, tmp_path, number):
    command = [sys.executable, "-m", "tadperf", "distill", *tiny, "--out", "my run", "--set", "match.iterations=100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, preexec_fn=hear_interrupts, **pipes)
    metrics = tmp_path / "my run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and "matching" in metrics.read_text():
            break
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1] == "tadperf: interrupted; continue with: tadperf distill --resume --out 'my run'"
    seconds = json.loads((tmp_path / "my run" / "stages.json").read_text())["matching"]["seconds"]
    assert seconds > 0
    refused = tadperf("distill", "--resume", "--out", "my run", "--ipc", "2")
    assert refused.code == 2  # --resume keeps the stored config: 100000 iterations and IPC 1


def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(tiny, tmp_path):
    command = [sys.executable, "-m", "tadperf", "distill", *tiny, "--quiet", "--json", "--out"]
    subprocess.run([*command, "whole"], cwd=tmp_path, check=True, capture_output=True)
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    for waited_for in ("experts/*.safetensors", "checkpoints/*"):
        resume = ["--resume"] if (tmp_path / "killed").exists() else []
        process = subprocess.Popen([*command, "killed", *resume], cwd=tmp_path, stdout=subprocess.DEVNULL)
        while process.poll() is None and not list((tmp_path / "killed").glob(waited_for)):
            time.sleep(0.002)
        process.kill()
        process.wait()
    subprocess.run([*command, "killed", "--resume"], cwd=tmp_path, check=True, capture_output=True)
    result = json.loads((tmp_path / "killed" / "result.json").read_text())
    for key in ("accuracy", "baselines", "lr", "data"):
        assert result[key] == whole[key]
    for name in ("distilled.safetensors", "grid.png", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    metrics = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("killed", "whole")]
    killed, undisturbed = ([line for line in lines if '"matching"' in line] for lines in metrics)
    assert killed == undisturbed  # no record is doubled or lost
