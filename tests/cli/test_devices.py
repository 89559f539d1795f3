"""`--devices 2` and torchrun give the results of one process, and one clear message when a rank dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ranks end with their launcher on Linux only"),
]
MORE = ["--set=match.trajectories=2", "--set=experts.count=3", "--json"]
ENV = {"OMP_NUM_THREADS": "1"}


def command(tiny: list[str], *more: str) -> list[str]:
    return [sys.executable, "-m", "tadperf", "distill", *tiny, *MORE, *more]


def start(place: Path, arguments: list[str]) -> subprocess.Popen[str]:
    def hear_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, cwd=place, preexec_fn=hear_interrupts, env=os.environ | ENV, **pipes)


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline and not condition():
        time.sleep(0.01)
    assert condition(), process.poll()


def environment(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    except (OSError, UnicodeDecodeError):
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def team(launcher: int) -> dict[int, int]:
    """Returns process id -> rank of all processes that this launcher has started, with their workers."""
    pids = [int(place.name) for place in Path("/proc").glob("[0-9]*")]
    environments = {pid: environment(pid) for pid in pids}
    return {pid: int(e["RANK"]) for pid, e in environments.items() if e.get("TADPERF_LAUNCHER") == str(launcher)}


def gone(launcher: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while team(launcher) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not team(launcher)


def rank_1(launcher: int) -> int:
    """Returns the process id of rank 1, not of its workers."""
    return min(pid for pid, rank in team(launcher).items() if rank == 1)


def assert_same(one: Path, two: Path) -> None:
    """Asserts that trajectories and distilled set are equal up to the order of a sum."""
    files = sorted((one / "experts").glob("*.safetensors"))
    assert len(files) == 3
    for file in [*files, one / "distilled.safetensors"]:
        a, b = load_file(file), load_file(two / file.relative_to(one))
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)
    results = [json.loads((place / "result.json").read_text()) for place in (one, two)]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[0]["trust"] == results[1]["trust"]
    assert not list(two.rglob("*.tmp"))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Path:
    """Returns the folder of a run by a single process."""
    from .conftest import TINY

    place = tmp_path_factory.mktemp("one")
    done = start(place, command(TINY, "--out=one", "--quiet"))
    out, err = done.communicate()
    assert done.returncode == 0, err
    assert json.loads(out)["ipc"] == 1
    return place / "one"


def test_two_ranks_give_the_same_run_as_one(one_rank, tiny, tmp_path):
    process = start(tmp_path, command(tiny, "--devices=2", "--out=two"))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["paths"]["run"] == "two"
    assert sum(line.startswith("trust 1/1") for line in err.splitlines()) == 1  # only rank 0 prints
    assert "tadperf:" not in err
    assert gone(process.pid)
    assert_same(one_rank, tmp_path / "two")


def test_two_ranks_give_the_same_refined_images_as_one(tadperf, tiny, tmp_path):
    from .test_refine import REFINE

    job = ["refine", "digits", *(option for option in tiny if option != "--repeats=2"), *REFINE, "--batch=4", "--quiet"]
    alone = tadperf(*job, "--out", "one")
    assert alone.code == 0, alone.err
    process = start(tmp_path, [sys.executable, "-m", "tadperf", *job, "--devices=2", "--out=two", "--json"])
    out, err = process.communicate()
    assert process.returncode == 0, err
    files = [tmp_path / name / "distilled.safetensors" for name in ("one", "two")]
    assert torch.equal(*(load_file(file)["images"] for file in files))
    assert (
        json.loads(out)["refine"]["rounds"]
        == json.loads((tmp_path / "one" / "result.json").read_text())["refine"]["rounds"]
    )


def test_a_killed_rank_ends_all_ranks_and_the_run_can_be_resumed(one_rank, tiny, tmp_path):
    process = start(tmp_path, command(tiny, "--devices=2", "--out=my run"))
    wait_for((tmp_path / "my run" / "trust" / "round-1.safetensors").exists, process)
    os.kill(rank_1(process.pid), signal.SIGKILL)
    begun = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 20
    assert (process.returncode, out) == (1, "")
    hint = "continue with: tadperf distill --devices 2 --resume --out 'my run'"
    assert [line for line in err.splitlines() if "tadperf" in line] == [
        f"tadperf: rank 1 of 2 was killed by SIGKILL; {hint}"
    ]
    assert gone(process.pid)
    again = [sys.executable, "-m", "tadperf", "distill", "--resume", "--out", "my run", "--quiet"]  # in one process
    assert start(tmp_path, again).wait() == 0
    assert_same(one_rank, tmp_path / "my run")


def test_ctrl_c_ends_all_ranks_with_one_line_and_a_killed_launcher_leaves_no_process(tiny, tmp_path):
    process = start(tmp_path, command(tiny, "--devices=2", "--out=run", "--set=match.iterations=1000000"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and "matching" in metrics.read_text(), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in err.splitlines() if "tadperf" in line] == [
        "tadperf: interrupted; continue with: tadperf distill --devices 2 --resume --out run"
    ]
    assert gone(process.pid)
    process = start(tmp_path, command([], "--devices=2", "--out=run", "--resume"))
    wait_for(lambda: len(team(process.pid)) >= 2, process)
    process.kill()
    process.communicate()
    assert gone(process.pid)


def test_torchrun(one_rank, tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tadperf"]
    file = str(one_rank / "distilled.safetensors")
    process = start(tmp_path, [*run, "evaluate", file, "--repeats=2", "--json"])
    out, err = process.communicate()
    assert process.returncode == 0, err
    alone = json.loads((one_rank / "result.json").read_text())
    assert json.loads(out)["accuracy"] == alone["accuracy"]


def test_an_error_of_both_ranks_is_printed_once(tiny, tmp_path, tadperf):
    wrong = start(tmp_path, command(tiny[1:], "--devices=2", "--ipc=2000"))
    _, err = wrong.communicate(timeout=60)
    assert wrong.returncode == 2
    assert len([line for line in err.splitlines() if line.startswith("tadperf: --ipc: 2000: ")]) == 1
    assert len([line for line in err.splitlines() if "tadperf" in line]) == 1
    refused = tadperf("distill", *tiny, "--devices", "0")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == "tadperf: --devices: 0: must be a whole number from 1 up\n"
