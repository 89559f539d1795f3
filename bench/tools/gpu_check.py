"""Checks and measures everything on a GPU in one call.

Run `python -m tadperf.bench.tools.gpu_check [--quick] [--json FILE]`. It checks each operator, then measures it, in a
process with a time limit: a hang or a broken CUDA context affects that operator only. A failure becomes a row.
`--device cpu` runs the same steps on small inputs. `bash bench/tools/gpu_plan.sh` measures whole jobs and stages, too.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tadperf.bench.operators import catalogue, checks, report
from tadperf.bench.processes import run_with_limit

SECONDS = 450.0  # for everything; not tuned
OPERATOR_SECONDS = 120.0  # for one operator, or for one tool of the sanitizer; not tuned
TOOLS = ("memcheck", "racecheck")


def run_process(arguments: Sequence[str], limit: float) -> tuple[list[dict[str, Any]], str]:
    """Runs a process. Returns the rows that it printed within the limit, and its failure: empty if it succeeded.

    The limit also holds for the processes that it starts.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        try:
            code = run_with_limit(arguments, limit, stdout=out, stderr=log).returncode
            ended = "" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        out.seek(0)
        log.seek(0)
        lines, words = out.read().splitlines(), log.read().splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return rows, ended and f"{ended}: {words[-1] if words else 'silent'}"


def check_operators(names: Sequence[str], device: str, quick: bool, end: float) -> list[dict[str, Any]]:
    """Returns the rows of all checks and measurements, operator by operator."""
    rows: list[dict[str, Any]] = []
    for name in names:
        limit = min(OPERATOR_SECONDS, end - time.monotonic())
        command = [sys.executable, "-m", "tadperf.bench.tools.gpu_check", "--only", name, "--device", device]
        command += ["--quick"] * quick
        results, failure = run_process(command, limit) if limit > 5 else ([], "no time was left")
        rows += results
        if failure:
            rows.append(checks.row(name, "process", "FAIL", failure, 0.0))
        print(f"{name}: {len(results)} rows", file=sys.stderr, flush=True)
    return rows


def run_sanitizer(device: str, end: float) -> list[dict[str, Any]]:
    """Returns a row for each tool of compute-sanitizer, over one small call of each operator."""
    program = shutil.which("compute-sanitizer")
    if device == "cpu" or program is None:
        reason = "is for CUDA" if device == "cpu" else "is not on PATH"
        return [checks.row("all", tool, "SKIP", f"compute-sanitizer {reason}", 0.0) for tool in TOOLS]
    rows = []
    for tool in TOOLS:
        start, limit = time.monotonic(), min(OPERATOR_SECONDS, end - time.monotonic())
        command = [
            program,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "tadperf.bench.tools.gpu_check",
        ]
        _, failure = run_process([*command, "--only", "small"], limit) if limit > 5 else ([], "no time was left")
        # Exit code 9 means that the tool has found an error. Another one means that the tool itself has failed.
        status = "PASS" if not failure else "FAIL" if "exit code 9" in failure else "SKIP"
        rows.append(checks.row("all", tool, status, failure, time.monotonic() - start))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operators", nargs="*", help=", ".join(catalogue.NAMES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="measure tadperf only, without baselines")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.only:
        checks.main(options.only, device, options.quick)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: no CUDA device found; --device cpu runs the same steps on small inputs", file=sys.stderr)
        return 2
    names, end = [bench.name for bench in catalogue.load_benches(options.operators)], time.monotonic() + SECONDS
    rows = check_operators(names, options.device, options.quick, end) + run_sanitizer(options.device, end)
    facts = checks.facts(device)
    results = [row for row in rows if "check" in row]
    measured = [row for row in rows if "check" not in row]
    if options.json:
        command = shlex.join(["python", "-m", "tadperf.bench.tools.gpu_check", *(arguments or sys.argv[1:])])
        options.json.write_text(
            json.dumps({"command": command, **facts, "checks": results, "rows": measured}, indent=1)
        )
    for name in names:
        print("", name, *report.lines([row for row in measured if row["operator"] == name]), sep="\n")
    print("", "  ".join(f"{name}: {value}" for name, value in facts.items()), *checks.lines(results), sep="\n")
    failed = sum(row["status"] == "FAIL" for row in results)
    print(f"{len(results) - failed} of {len(results)} without failure")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
