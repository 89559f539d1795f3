"""Measures the stages on a GPU: the phases `experts`, `matching` and `job` of `gpu_check`.

Run `python -m tadperf.bench.tools.gpu_check --phase job --out DIR [--data cifar10 --labels FILE]`.
A call ends within its time limit and keeps its finished parts in DIR. Repeat the same call until it says that
everything is done. With --device cpu it runs the same steps on digits.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tadperf.bench.processes import run_with_limit
from tadperf.bench.stages import runner

Row = dict[str, Any]
PHASES = ("experts", "matching", "job")
CASES = {  # phase -> stage, and the cases of the stage by type of device
    "experts": ("experts", {"cuda": ("cifar10",), "cpu": ("digits",)}),
    "matching": ("matching", {"cuda": ("cifar10-ipc10", "cifar10-ipc50"), "cpu": ("digits",)}),
}
# Goals for tadperf's row on an H200: a figure must reach its value; memory_share must not exceed it.
BARS = {
    "experts": {"samples_s": 0.35e6},
    "matching": {"over_published": 3.0, "memory_share": 0.2},
}
MODES = ("off", "on", "oracle")
STOP = 20.0  # seconds that an interrupted run gets to end cleanly; not tuned
SMALL = (
    "net.width=8",
    "net.depth=1",
    "experts.count=2",
    "experts.epochs=2",
    "match.iterations=6",
    "match.check_every=3",
    "match.steps=2",
    "match.max_start=1",
    "match.expert_epochs=1",
    "evaluate.epochs=3",
    "evaluate.repeats=1",
    "evaluate.full_epochs=1",
    "evaluate.full_repeats=1",
    "trust.rounds=1",
    "trust.proxies=2",
    "trust.epochs=2",
)


def mark_missed_bars(phase: str, rows: Sequence[Row]) -> list[Row]:
    """Adds the missed goals to tadperf's rows, under "missed". Returns all rows."""
    for row in rows:
        if row["provider"] != "tadperf" or phase not in BARS:
            continue
        figures = {name: (row.get(name), bar) for name, bar in BARS[phase].items()}
        row["missed"] = [
            f"{name} {value if value is None else round(value, 3)}, goal {bar}"
            for name, (value, bar) in figures.items()
            if value is None or (value > bar if name == "memory_share" else value < bar)
        ]
    return list(rows)


def measure_phase(phase: str, device: str, folder: Path, end: float) -> bool:
    """Measures the cases that `folder` lacks, each in its own process. Returns whether all are done."""
    stage, cases = CASES[phase]
    for case in cases[device]:
        file = folder / f"{phase}-{case}.json"
        if file.exists():
            continue
        if (left := end - time.monotonic()) < STOP:
            return False
        command = [sys.executable, "-m", "tadperf.bench.tools.gpu_stages", stage, case, device]
        try:
            done = run_with_limit(command, left, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except subprocess.TimeoutExpired:
            print(f"{phase} {case}: did not end within {left:.0f} s", file=sys.stderr)
            return False
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["silent"])[-1]
            rows = [runner.make_row(stage, case, "tadperf", "tadperf", error=last)]
        else:
            rows = json.loads(done.stdout.splitlines()[-1])
        file.write_text(json.dumps(mark_missed_bars(phase, rows), indent=1))
    return True


def run_jobs(device: str, folder: Path, end: float, data: str, labels: str | None) -> bool:
    """Runs jobs with trust off, on and the oracle. Returns whether all are done; the next call resumes them."""
    for mode in MODES:
        out = folder / f"job-{mode}"
        if (out / "DONE").exists():
            continue
        if (left := end - time.monotonic() - STOP) < STOP:
            return False
        command = [sys.executable, "-m", "tadperf", "distill", "--quiet", "--json", "--out", str(out)]
        if out.exists():
            command += ["--resume"]
        else:
            command += [data, "--trust", mode, "--device", device]
            command += ["--labels", labels] if labels else ["--noise", "asymmetric:0.4"]
            options = SMALL if device == "cpu" else ()
            command += ["--preset", "digits-ipc1" if device == "cpu" else "cifar10-ipc10"]
            command += [part for option in options for part in ("--set", option)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, words = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            return False
        if process.returncode:
            raise RuntimeError(f"trust {mode} ended with {process.returncode}: {words.strip().splitlines()[-1:]}")
    return True


def lines(phase: str, folder: Path) -> list[str]:
    """Returns what is done so far, as lines of text."""
    if phase != "job":
        rows = [row for file in sorted(folder.glob(f"{phase}-*.json")) for row in json.loads(file.read_text())]
        missed = [f"{row['case']}: {goal}" for row in rows for goal in row.get("missed", ())]
        return [*runner.lines(rows), *(f"below the goal: {text}" for text in missed)]
    texts = []
    for mode in MODES:
        if (folder / f"job-{mode}" / "DONE").exists():
            result = json.loads((folder / f"job-{mode}" / "result.json").read_text())
            accuracy = result["accuracy"]["convnet"]
            seconds = ", ".join(f"{name} {stage['seconds']:.0f} s" for name, stage in result["stages"].items())
            texts.append(f"trust {mode}: {100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} %; {seconds}")
    return texts


def main(phase: str, device: str, folder: Path, limit: float, data: str, labels: str | None) -> int:
    """Runs one phase. Returns 0 if everything is done, 3 if the same call must be repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limit
    if phase == "job":
        complete = run_jobs(device, folder, end, data, labels)
    else:
        complete = measure_phase(phase, device, folder, end)
    print(*lines(phase, folder), sep="\n")
    print(f"{phase}: " + ("everything is done" if complete else "not done yet; repeat the same call"))
    return 0 if complete else 3


def stage_rows(stage: str, case: str, device: str) -> list[Row]:
    """Measures one case of a stage five times. Returns the rows with the ratios that the goals need."""
    import torch

    rows = runner.load(stage).measure(case, torch.device(device), 5)
    runner.ratios(rows)
    return rows


if __name__ == "__main__":
    print(json.dumps(stage_rows(*sys.argv[1:])))
