"""`tadperf bench matching|experts|students|refinement`: compares a stage with the published code of its method.

The file of a stage has `SIZES` (its cases by name), `DEFAULT_SIZES` (if the default is not all of them),
`measure(size, device, repeats)`, which returns rows from `make_row`, and `single_call(size, provider, device)`, which
returns a function that makes one complete call, to measure its peak memory in a new process. Providers take turns in
one process (`engine.interleaved`). "published" is the method as its authors implemented it; its code is in this folder.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch

from tadperf.bench.operators import report
from tadperf.bench.operators.engine import Row
from tadperf.bench.processes import run_with_limit
from tadperf.compute.device import resolve_device
from tadperf.errors import UserError
from tadperf.run.stage_meter import cuda_peak, process_peak

STAGES = ("matching", "experts", "students", "refinement")
RENAMED = {"distil": "matching", "evaluate": "students", "refine": "refinement"}  # words of earlier versions
FAMILIES = ("tadperf", "published", "eager", "inductor")
EMPTY = dict.fromkeys(
    (
        "median_ms",
        "q20_ms",
        "q80_ms",
        "rounds",
        "peak_mb",
        "compile_s",
        "warm_s",
        "over_published",
        "over_eager",
        "memory_share",
        "error",
        "note",
    )
)
COLUMNS = {
    "case": "{}",
    "provider": "{}",
    "median_ms": "{:.4g}",
    "q20_ms": "{:.4g}",
    "q80_ms": "{:.4g}",
    "peak_mb": "{:.0f}",
    "compile_s": "{:.1f}",
    "warm_s": "{:.1f}",
    "gradient_error": "{:.1e}",
    "samples_s": "{:.4g}",
    "over_published": "{:.2f}",
    "over_eager": "{:.2f}",
    "memory_share": "{:.2f}",
    "note": "{}",
}
TIMEOUT = 600.0  # seconds for one call in a new process; not tuned


class Stage(Protocol):
    """The file of a stage."""

    SIZES: Mapping[str, Any]

    def measure(self, size: str, device: torch.device, repeats: int) -> list[Row]: ...

    def single_call(self, size: str, provider: str, device: torch.device) -> Any: ...


def load(name: str) -> Stage:
    """Returns the bench of one stage."""
    return cast(Stage, importlib.import_module(f"tadperf.bench.stages.{name}"))


def sizes(stage: Stage, text: str | None) -> list[str]:
    """Reads a list of sizes such as "digits,cifar10"; by default DEFAULT_SIZES of the stage, or all its sizes.

    Raises UserError for an unknown size.
    """
    default = getattr(stage, "DEFAULT_SIZES", stage.SIZES)
    wanted = [part.strip() for part in text.split(",")] if text else list(default)
    for name in wanted:
        if name not in stage.SIZES:
            raise UserError("--sizes", name, f"must be one of {', '.join(stage.SIZES)}")
    return wanted


def make_row(stage: str, case: str, provider: str, family: str, times: np.ndarray | None = None, **values: Any) -> Row:
    """Returns the row of one provider on one case. times: ms of each turn; without times, `error` gives the reason."""
    assert family in FAMILIES
    row: Row = {"stage": stage, "case": case, "provider": provider, "family": family, **EMPTY}
    if times is not None:
        q20, median, q80 = (float(q) for q in np.quantile(times, (0.2, 0.5, 0.8)))
        row |= {"median_ms": median, "q20_ms": q20, "q80_ms": q80, "rounds": len(times)}
    return row | values


def ratios(rows: Sequence[Row]) -> None:
    """Adds to each row how many times faster it is than the published and the fastest eager row of its case.

    Also adds its peak memory as a share of the published row's.
    """
    for case in dict.fromkeys(row["case"] for row in rows):
        group = [row for row in rows if row["case"] == case]
        for family in ("published", "eager"):
            medians = [row["median_ms"] for row in group if row["family"] == family and row["median_ms"]]
            for row in group:
                if medians and row["median_ms"]:
                    row[f"over_{family}"] = min(medians) / row["median_ms"]
        peaks = [row["peak_mb"] for row in group if row["family"] == "published" and row["peak_mb"]]
        for row in group:
            if peaks and row["peak_mb"]:
                row["memory_share"] = row["peak_mb"] / min(peaks)


def peak_memory(stage: str, size: str, provider: str, device: torch.device) -> float | None:
    """Returns the peak MB of a new process that makes one call: resident on a CPU, of PyTorch's allocator on CUDA.

    Returns None if that process failed or took too long. Inputs and PyTorch's own code count too.
    """
    command = [sys.executable, "-m", "tadperf.bench.stages.runner", stage, size, provider, str(device)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    try:
        done = run_with_limit(command, TIMEOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        done.check_returncode()
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return None
    return float(done.stdout.split()[-1])


def facts(stage: str, device: torch.device, threads: int, command: str) -> Row:
    """Returns the stage, the machine and the versions, which every row repeats."""
    return {"stage": stage, **report.machine_facts(device, threads, command)}


def title(facts: Mapping[str, Any]) -> str:
    """Returns one line about the stage, the machine and the version."""
    return f"{facts['stage']} on {facts['device']}, {facts['threads']} threads, torch {facts['versions']['torch']}"


def lines(rows: Sequence[Row]) -> list[str]:
    """Returns the rows of one stage as aligned text, and a line for each provider that failed."""
    failed = [f"{row['case']} {row['provider']}: {row['error']}" for row in rows if row["error"]]
    return report.table(rows, COLUMNS) + failed


def main(stage: str, size: str, provider: str, device_name: str) -> None:
    device = resolve_device(device_name)
    load(stage).single_call(size, provider, device)()
    print(cuda_peak()["peak_cuda_mb"] if device.type == "cuda" else process_peak() / 2**20)


if __name__ == "__main__":
    main(*sys.argv[1:])
