"""Interrupts runs at random moments and resumes them: every result must equal that of an undisturbed run.

Run `python -m tadperf.bench.tools.kill_resume --jobs matching hybrid --kills 20 --signal KILL`. A job is a small run on
the digits by the real command line. Each of the K kills has its own run. Kill k comes at a random moment in the k-th of
K equal parts of the undisturbed run's duration. One more run gets all kills. An audit cannot resume: it starts again.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMON = ["--device=cpu", "--quiet", "--json", "--noise=asymmetric:0.3"]
MATCHING = {
    "net.width": 8,
    "experts.count": 4,
    "experts.epochs": 6,
    "match.iterations": 60,
    "match.check_every": 20,
    "match.steps": 5,
    "match.max_start": 4,
    "match.expert_epochs": 2,
    "evaluate.epochs": 60,
    "evaluate.full_epochs": 2,
    "evaluate.full_repeats": 2,
}
REFINEMENT = {
    "trust.mode": "off",
    "detector.depth": 1,
    "detector.width": 8,
    "detector.epochs": 3,
    "diffusion.width": 8,
    "diffusion.iterations": 30,
    "diffusion.batch": 32,
    "refine.steps": 6,
    "refine.rounds": 3,
    "refine.candidates": 2,
    "refine.top_k": 1,
}
DISTILL = ["distill", "--ipc=1", "--repeats=2", *COMMON]


def _sets(*settings: dict[str, Any]) -> list[str]:
    return [f"--set={name}={value}" for part in settings for name, value in part.items()]


JOBS = {
    "matching": [*DISTILL, *_sets(MATCHING)],
    "generative": [*DISTILL, "--synthesis=generative", *_sets(MATCHING, REFINEMENT)],
    "hybrid": [*DISTILL, "--synthesis=hybrid", *_sets(MATCHING, REFINEMENT)],
    "audit": [
        "audit",
        "digits",
        *COMMON,
        *_sets({"net.width": 8, "trust.rounds": 2, "trust.proxies": 2, "trust.epochs": 3}),
    ],
}
# Files and keys of a result that hold times, paths or an order of events. These may differ.
MEASURED_FILES = ("env.json", "stages.json", "metrics.jsonl", "result.json", "report.html", "evaluate.json", ".lock")
MEASURED = ("stages", "seconds", "paths")
STAGES = {  # stage -> the file that shows that a run has reached it; the latest stage first
    "done": "DONE",
    "evaluate": "distilled.safetensors",
    "matching": "checkpoints/initial.safetensors",
    "experts": "experts",
    "refine": "checkpoints/refine.safetensors",
    "diffusion": "diffusion",
    "detector": "detector.safetensors",
    "data": "config.json",
}


def start(job: str, folder: Path) -> subprocess.Popen[bytes]:
    """Starts the job in `folder`, or resumes it. An audit deletes its files and starts again."""
    command = [sys.executable, "-m", "tadperf", *JOBS[job]]
    if job == "audit":
        folder.mkdir(exist_ok=True)
        for file in (folder / "labels.csv", folder / "labels.png"):
            file.unlink(missing_ok=True)
        command += ["--out", str(folder / "labels.csv")]
    else:
        command += ["--out", str(folder)] + ["--resume"] * folder.exists()
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(job: str, folder: Path) -> float:
    """Runs the job to its end. Returns the seconds. Raises RuntimeError if it fails."""
    begun = time.perf_counter()
    process = start(job, folder)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{folder.name} ended with {process.returncode}: {errors.decode()}")
    return time.perf_counter() - begun


def is_done(job: str, folder: Path) -> bool:
    """Returns whether the job has written its last file."""
    return (folder / ("labels.png" if job == "audit" else "DONE")).exists()


def reached(folder: Path) -> str:
    """Returns the stage that the run in `folder` has reached."""
    return next((stage for stage, mark in STAGES.items() if (folder / mark).exists()), "start")


def kill(job: str, folder: Path, moment: float, number: int = signal.SIGKILL) -> str:
    """Starts or resumes the job and sends it a signal after `moment` seconds. Returns the stage that it was in.

    Raises RuntimeError if the job fails before the signal, or if its exit code does not say that it was interrupted.
    """
    process = start(job, folder)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    _, errors = process.communicate()
    code = process.returncode
    if code == 0 and is_done(job, folder):
        return "ended before the signal"
    if code not in (130, -number):
        raise RuntimeError(f"{folder.name}, at {reached(folder)}, ended with {code}: {errors.decode()}")
    return reached(folder)


def moments(kills: int, duration: float, seed: int) -> list[float]:
    """Returns a random time in each of `kills` equal parts of the duration, in order."""
    rng = random.Random(seed)
    return [(k + rng.random()) / kills * duration for k in range(kills)]


def differences(folder: Path, undisturbed: Path) -> list[str]:
    """Returns the files of a finished run that differ from the undisturbed run, except for times and paths."""
    names = {
        str(file.relative_to(place))
        for place in (folder, undisturbed)
        for file in place.rglob("*")
        if file.is_file() and file.name not in MEASURED_FILES
    }
    differing = [name for name in sorted(names) if _bytes(folder / name) != _bytes(undisturbed / name)]
    if (undisturbed / "result.json").exists():
        differing += ["result.json"] * (_result(folder) != _result(undisturbed))
        differing += ["metrics.jsonl"] * (_records(folder) != _records(undisturbed))
        differing += ["evaluate.json"] * (_scores(folder) != _scores(undisturbed))
    return differing


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def _result(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_bytes())
    return {name: value for name, value in result.items() if name not in MEASURED}


def _scores(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / "evaluate.json").read_bytes())


def _records(folder: Path) -> list[str]:
    """Returns the sorted records of metrics.jsonl without those of students, which end in any order (see `_scores`)."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sorted(json.dumps(record) for record in records if record["stage"] != "evaluate")


def run_job(job: str, kills: int, number: int, seed: int, place: Path) -> int:
    """Applies each kill to its own run, and all kills to one more run. Prints what differs. Returns how many differ."""
    undisturbed, chain = place / "undisturbed", place / "all-kills"
    duration = finish(job, undisturbed)
    print(f"{job}: undisturbed {duration:.1f} s, {signal.Signals(number).name}", flush=True)
    times, wrong = moments(kills, duration, seed), 0
    for k, moment in enumerate(times):
        folder = place / f"killed-{k}"
        try:
            stage = kill(job, folder, moment, number)
            finish(job, folder)
            differing = differences(folder, undisturbed)
        except RuntimeError as error:
            stage, differing = "failed", [str(error)]
        wrong += bool(differing)
        print(f"{moment:6.2f} s  {stage:<24}{'differs: ' + ', '.join(differing) if differing else 'equal'}", flush=True)
    try:
        stages = [kill(job, chain, moment, number) for moment in times]
        finish(job, chain)
        differing = differences(chain, undisturbed)
    except RuntimeError as error:
        stages, differing = [], [str(error)]
    print("one run, all kills:", ", ".join(stages), "-", "differs: " + ", ".join(differing) if differing else "equal")
    return wrong + bool(differing)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--kills", type=int, default=20, help="kills for each job")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT", "HUP"), default="KILL")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    options = parser.parse_args(arguments)
    number, wrong = signal.Signals[f"SIG{options.signal}"], 0
    for job in options.jobs:
        with tempfile.TemporaryDirectory() as place:
            wrong += run_job(job, options.kills, number, options.seed, Path(place))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
