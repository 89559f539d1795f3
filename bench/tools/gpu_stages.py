"""What the stages have to show on a GPU: the phases `experts`, `matching` and `job` of `gpu_check`.

`python -m tadperf.bench.tools.gpu_check --phase job --out DIR [--data cifar10 --labels FILE]`.
A call ends within its limit and leaves what it has finished in DIR; the same call again goes on from there,
until it says that all is done. With --device cpu the same steps on digits.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tadperf.bench.stages import runner

Row = dict[str, Any]
PHASES = ("experts", "matching", "job")
CASES = {  # phase -> stage, and its cases by type of device
    "experts": ("experts", {"cuda": ("cifar10",), "cpu": ("digits",)}),
    "matching": ("matching", {"cuda": ("cifar10-ipc10", "cifar10-ipc50"), "cpu": ("digits",)}),
}
# What tadperf's row is to reach on an H200: figure -> least, or most where it is a share.
BARS = {
    "experts": {"samples_s": 0.35e6},
    "matching": {"over_published": 3.0, "memory_share": 0.2},
}
MODES = ("off", "on", "oracle")
STOP = 20.0  # seconds that an interrupted run has to leave its folder in order
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


def judged(phase: str, rows: Sequence[Row]) -> list[Row]:
    """The rows, tadperf's own with the bars that it misses."""
    for row in rows:
        if row["provider"] != "tadperf" or phase not in BARS:
            continue
        figures = {name: (row.get(name), bar) for name, bar in BARS[phase].items()}
        row["missed"] = [
            f"{name} {value if value is None else round(value, 3)}, bar {bar}"
            for name, (value, bar) in figures.items()
            if value is None or (value > bar if name == "memory_share" else value < bar)
        ]
    return list(rows)


def measured(phase: str, device: str, folder: Path, end: float) -> bool:
    """Measures what `folder` lacks, case by case in a process of its own; whether all is there."""
    stage, cases = CASES[phase]
    for case in cases[device]:
        file = folder / f"{phase}-{case}.json"
        if file.exists():
            continue
        if (left := end - time.monotonic()) < STOP:
            return False
        command = [sys.executable, "-m", "tadperf.bench.tools.gpu_stages", stage, case, device]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        try:
            out, words = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # it has children of its own
            process.communicate()
            print(f"{phase} {case}: did not end in {left:.0f} s", file=sys.stderr)
            return False
        if process.returncode:
            last = (words.strip().splitlines() or ["silent"])[-1]
            rows = [runner.row(stage, case, "tadperf", "tadperf", error=last)]
        else:
            rows = json.loads(out.splitlines()[-1])
        file.write_text(json.dumps(judged(phase, rows), indent=1))
    return True


def job(device: str, folder: Path, end: float, data: str, labels: str | None) -> bool:
    """Whole runs with trust off, on and the oracle, stopped at the time limit and resumed by the next call."""
    for mode in MODES:
        place = folder / f"job-{mode}"
        if (place / "DONE").exists():
            continue
        if (left := end - time.monotonic() - STOP) < STOP:
            return False
        command = [sys.executable, "-m", "tadperf", "distill", "--quiet", "--json", "--out", str(place)]
        if place.exists():
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
    """What is there so far, in words."""
    if phase != "job":
        rows = [row for file in sorted(folder.glob(f"{phase}-*.json")) for row in json.loads(file.read_text())]
        missed = [f"{row['case']}: {one}" for row in rows for one in row.get("missed", ())]
        return [*runner.lines(rows), *(f"below the bar: {one}" for one in missed)]
    found = []
    for mode in MODES:
        if (folder / f"job-{mode}" / "DONE").exists():
            result = json.loads((folder / f"job-{mode}" / "result.json").read_text())
            accuracy = result["accuracy"]["convnet"]
            seconds = ", ".join(f"{name} {stage['seconds']:.0f} s" for name, stage in result["stages"].items())
            found.append(f"trust {mode}: {100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} %; {seconds}")
    return found


def main(phase: str, device: str, folder: Path, limit: float, data: str, labels: str | None) -> int:
    """One phase; 0 where all is there, 3 where the same call has to be made again."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limit
    complete = job(device, folder, end, data, labels) if phase == "job" else measured(phase, device, folder, end)
    print(*lines(phase, folder), sep="\n")
    print(f"{phase}: " + ("all is done" if complete else "not done yet: make the same call again"))
    return 0 if complete else 3


def rows_of(stage: str, case: str, device: str) -> list[Row]:
    """What a stage's bench measures of one case, five turns, with the ratios that the bars are about."""
    import torch

    rows = runner.load(stage).measure(case, torch.device(device), 5)
    runner.ratios(rows)
    return rows


if __name__ == "__main__":
    print(json.dumps(rows_of(*sys.argv[1:])))
