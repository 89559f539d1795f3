"""Measures the peak memory of each provider of an operator, without its inputs, in a new process.

In that process glibc returns every tensor to the system when it is freed (MALLOC_MMAP_THRESHOLD_), so a provider cannot
use memory that an earlier one has left. Results count, inputs do not. Each provider runs once before it is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tadperf.bench.operators import catalogue
from tadperf.bench.operators.engine import Size
from tadperf.bench.processes import run_with_limit
from tadperf.run.stage_meter import process_peak, reset_peak

TIMEOUT = 120.0  # seconds for all providers of one case; not tuned


def measure_peaks(operator: str, size: Size, dtype: torch.dtype, providers: Sequence[str]) -> dict[str, float]:
    """Returns MB by provider, or an empty dict if the peak cannot be reset, or the process fails or takes too long."""
    if not providers:
        return {}
    case = [operator, "x".join(map(str, size)), str(dtype).removeprefix("torch."), str(torch.get_num_threads())]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tadperf.bench.operators.peak", *case, *providers]
    try:
        done = run_with_limit(command, TIMEOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        done.check_returncode()
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return {}
    return json.loads(done.stdout)


def resident() -> int:
    """Returns the resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(operator: str, size: str, dtype: str, threads: str, *providers: str) -> None:
    torch.set_num_threads(int(threads))
    bench = catalogue.load(operator)
    peaks = {}
    with torch.inference_mode():
        inputs = bench.inputs(catalogue.parse_size(bench, size), getattr(torch, dtype), torch.device("cpu"), 0)
        for name in providers:
            function = bench.providers[name].build()
            function(*inputs)
            before = resident()
            reset_peak()
            if process_peak() - before > 2**22:  # this system does not reset the peak
                break
            results = function(*inputs)
            peaks[name] = round(max(process_peak() - before, 0) / 2**20, 1)
            del results
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(*sys.argv[1:])
