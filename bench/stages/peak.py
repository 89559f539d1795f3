"""Peak memory of each provider above its inputs, in a fresh process: `ask`.

There glibc returns every tensor to the system when it is freed (MALLOC_MMAP_THRESHOLD_), so that none hides in memory
that an earlier one left behind. Results count, inputs do not; each is called once before it is measured.
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
from tadperf.run.stage_meter import process_peak, reset_peak

TIMEOUT = 120.0  # seconds for all providers of one case


def ask(operator: str, size: Size, dtype: torch.dtype, providers: Sequence[str]) -> dict[str, float]:
    """MB by provider; empty where the system cannot tell or the process failed or took too long."""
    if not providers:
        return {}
    case = [operator, "x".join(map(str, size)), str(dtype).removeprefix("torch."), str(torch.get_num_threads())]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tadperf.bench.stages.peak", *case, *providers]
    try:
        out = subprocess.run(command, env=environment, capture_output=True, timeout=TIMEOUT, check=True, text=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return {}
    return json.loads(out.stdout)


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(operator: str, size: str, dtype: str, threads: str, *providers: str) -> None:
    torch.set_num_threads(int(threads))
    bench = catalogue.load(operator)
    found = {}
    with torch.inference_mode():
        inputs = bench.inputs(catalogue.parsed(bench, size), getattr(torch, dtype), torch.device("cpu"), 0)
        for name in providers:
            function = bench.providers[name].build()
            function(*inputs)
            before = resident()
            reset_peak()
            if process_peak() - before > 2**22:  # a system that does not reset it
                break
            results = function(*inputs)
            found[name] = round(max(process_peak() - before, 0) / 2**20, 1)
            del results
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
