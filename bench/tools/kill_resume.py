"""SIGKILL at random moments, then --resume: the bytes must be those of an undisturbed run.

`python -m tadperf.bench.tools.kill_resume --kills 20`: a small job on the digits through the real command line.
Every kill has a run of its own, its moment drawn from its share of the undisturbed run's duration;
a last run takes all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

JOB = [
    "--ipc=1",
    "--repeats=2",
    "--device=cpu",
    "--noise=asymmetric:0.3",
    "--quiet",
    "--json",
    *(
        f"--set={s}"
        for s in (
            "net.width=8",
            "experts.count=4",
            "experts.epochs=6",
            "match.iterations=60",
            "match.check_every=20",
            "match.steps=5",
            "match.max_start=4",
            "match.expert_epochs=2",
            "evaluate.epochs=60",
            "evaluate.full_epochs=2",
            "evaluate.full_repeats=2",
        )
    ),
]
MEASURED = ("stages", "seconds", "paths")  # of a result: what may differ


def start(folder: Path) -> subprocess.Popen[bytes]:
    """The job in `folder`, begun or resumed."""
    command = [sys.executable, "-m", "tadperf", "distill", *JOB, "--out", str(folder)]
    return subprocess.Popen(command + ["--resume"] * folder.exists(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(folder: Path) -> float:
    """Runs the job to its end; seconds."""
    begun = time.perf_counter()
    process = start(folder)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{folder.name} ended with {process.returncode}: {errors.decode()}")
    return time.perf_counter() - begun


def reached(folder: Path) -> str:
    """How far the run in `folder` has come."""
    marks = {
        "done": "DONE",
        "evaluate": "distilled.safetensors",
        "matching": "checkpoints/initial.safetensors",
        "experts": "experts",
        "data": "config.json",
    }
    return next((stage for stage, mark in marks.items() if (folder / mark).exists()), "start")


def kill(folder: Path, moment: float) -> str:
    """Starts or resumes the job and kills it `moment` seconds later; the stage that it was in."""
    process = start(folder)
    with contextlib.suppress(subprocess.TimeoutExpired):
        _, errors = process.communicate(timeout=moment)
        if process.returncode:
            raise RuntimeError(f"{folder.name} ended with {process.returncode}: {errors.decode()}")
        return "ended before"
    process.kill()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
    return reached(folder)


def moments(kills: int, duration: float, seed: int) -> list[float]:
    """A random moment in each of `kills` equal parts of the duration, in order."""
    rng = random.Random(seed)
    return [(k + rng.random()) / kills * duration for k in range(kills)]


def differences(folder: Path, whole: Path) -> list[str]:
    """What a finished run has otherwise than the undisturbed one; timings and paths apart."""
    names = ["distilled.safetensors", "grid.png", "config.json", "checkpoints/initial.safetensors"]
    names += [str(file.relative_to(whole)) for file in sorted((whole / "experts").iterdir())]
    found = [name for name in names if (folder / name).read_bytes() != (whole / name).read_bytes()]
    if _result(folder) != _result(whole):
        found.append("result.json")
    if _matching(folder) != _matching(whole):
        found.append("metrics.jsonl")
    return found + [str(file.relative_to(folder)) for file in folder.rglob("*.tmp")]


def _result(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_bytes())
    return {name: value for name, value in result.items() if name not in MEASURED}


def _matching(folder: Path) -> list[str]:
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"matching"' in line]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        whole, chain = Path(place, "whole"), Path(place, "chain")
        duration = finish(whole)
        print(f"undisturbed: {duration:.1f} s", flush=True)
        drawn, wrong = moments(options.kills, duration, options.seed), 0
        for k, moment in enumerate(drawn):
            folder = Path(place, f"killed-{k}")
            stage = kill(folder, moment)
            finish(folder)
            found = differences(folder, whole)
            wrong += bool(found)
            print(f"{moment:6.2f} s  {stage:<12}  {'differs: ' + ', '.join(found) if found else 'equal'}", flush=True)
        stages = [kill(chain, moment) for moment in drawn]
        finish(chain)
        found = differences(chain, whole)
        print("one run, all kills:", ", ".join(stages), "-", "differs: " + ", ".join(found) if found else "equal")
    return int(bool(wrong or found))


if __name__ == "__main__":
    sys.exit(main())
