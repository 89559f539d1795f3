"""`tadperf bench distil|experts|evaluate|refine`: a stage of a run beside the way its method was published.

A stage's file has `SIZES`, its cases by name, and `USUAL`, those measured unasked, where that is not all of them;
`measure(size, device, repeats)`, rows made by `row`; and `once(size, provider, device)`, one whole call as a function,
for the peak memory of a process of its own. Providers take turns in one process (`engine.interleaved`); "published" is
that method written plainly in the stage's own file.
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
TIMEOUT = 600.0  # seconds for one call in a process of its own


class Stage(Protocol):
    """What a stage's file holds."""

    SIZES: Mapping[str, Any]

    def measure(self, size: str, device: torch.device, repeats: int) -> list[Row]: ...

    def once(self, size: str, provider: str, device: torch.device) -> Any: ...


def load(name: str) -> Stage:
    """Returns the bench of one stage."""
    return cast(Stage, importlib.import_module(f"tadperf.bench.stages.{name}"))


def sizes(stage: Stage, text: str | None) -> list[str]:
    """The sizes in a list such as "digits,cifar10"; where there is none those that the stage calls USUAL, or all.

    Raises UserError for an unknown one.
    """
    usual = getattr(stage, "USUAL", stage.SIZES)
    wanted = [part.strip() for part in text.split(",")] if text else list(usual)
    for name in wanted:
        if name not in stage.SIZES:
            raise UserError("--sizes", name, f"must be among {', '.join(stage.SIZES)}")
    return wanted


def row(stage: str, case: str, provider: str, family: str, times: np.ndarray | None = None, **values: Any) -> Row:
    """One provider's figures on one case; times: ms of each of its turns. `error` says why there are none."""
    assert family in FAMILIES
    made: Row = {"stage": stage, "case": case, "provider": provider, "family": family, **EMPTY}
    if times is not None:
        q20, median, q80 = (float(q) for q in np.quantile(times, (0.2, 0.5, 0.8)))
        made |= {"median_ms": median, "q20_ms": q20, "q80_ms": q80, "rounds": len(times)}
    return made | values


def ratios(rows: Sequence[Row]) -> None:
    """Adds, within each case, how many times faster a row is than the published and the fastest eager one.

    And its peak memory as a share of the published one's.
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


def peak(stage: str, size: str, provider: str, device: torch.device) -> float | None:
    """Peak MB of a fresh process that makes one call: resident on a CPU, of PyTorch's allocator on CUDA.

    None where that process failed or took too long. The whole process counts, inputs and PyTorch's own code too.
    """
    command = [sys.executable, "-m", "tadperf.bench.stages.runner", stage, size, provider, str(device)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    try:
        out = subprocess.run(command, env=environment, capture_output=True, timeout=TIMEOUT, check=True, text=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return None
    return float(out.stdout.split()[-1])


def facts(stage: str, device: torch.device, threads: int, command: str) -> Row:
    """Where and with what a stage's rows were measured; part of every row."""
    return {"stage": stage, **report.where(device, threads, command)}


def title(facts: Mapping[str, Any]) -> str:
    """What the rows are about, in one line."""
    return f"{facts['stage']} on {facts['device']}, {facts['threads']} threads, torch {facts['versions']['torch']}"


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows of one stage as aligned text, and a line for each provider that failed."""
    failed = [f"{row['case']} {row['provider']}: {row['error']}" for row in rows if row["error"]]
    return report.table(rows, COLUMNS) + failed


def main(stage: str, size: str, provider: str, place: str) -> None:
    device = resolve_device(place)
    load(stage).once(size, provider, device)()
    print(cuda_peak()["peak_cuda_mb"] if device.type == "cuda" else process_peak() / 2**20)


if __name__ == "__main__":
    main(*sys.argv[1:])
