"""Measures wall time, peak memory and the operators of one stage of a run."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class StageMeter:
    """Measures one stage, starting from the values that earlier processes measured for it."""

    def __init__(self, name: str, before: Mapping[str, Any]) -> None:
        """before: the values of `measured` from earlier processes of the run; empty for a new stage."""
        self.name, self.before = name, before
        self.start = self.saved = time.monotonic()
        self.children, self.calls = children_peak(), operator_calls()
        reset_peak()

    def measured(self) -> dict[str, Any]:
        """Returns seconds, peak_memory_mb, kernels and, if CUDA was used, peak_cuda_mb so far (MB = 2**20 bytes).

        kernels: {operator: {implementation: calls}}, of this process and of the worker processes that have ended their
        task. Other ranks are left out: they run the same code. A CUDA graph counts when it is recorded.
        """
        self.saved = time.monotonic()
        children = children_peak()
        peaks = {
            "peak_memory_mb": max(process_peak(), children if children > self.children else 0) / 2**20,
            **cuda_peak(),
        }
        peaks = {key: round(max(value, self.before.get(key, 0)), 1) for key, value in peaks.items()}
        seconds = round(self.before.get("seconds", 0) + self.saved - self.start, 3)
        return {"seconds": seconds, **peaks, "kernels": self._kernels()}

    def _kernels(self) -> dict[str, dict[str, int]]:
        """Returns the calls of each operator by implementation, with those of earlier processes."""
        total = operator_calls() - self.calls
        for operator, calls in self.before.get("kernels", {}).items():
            total.update({(operator, implementation): count for implementation, count in calls.items()})
        kernels: dict[str, dict[str, int]] = {}
        for (operator, implementation), count in sorted(total.items()):
            kernels.setdefault(operator, {})[implementation] = count
        return kernels


def operator_calls() -> Counter[tuple[str, str]]:
    """Returns how often each (operator, implementation) was called by this process; see `kernels.dispatch`."""
    dispatch = sys.modules.get("tadperf.kernels.dispatch")
    return Counter() if dispatch is None else dispatch.call_counts()


def reset_peak() -> None:
    """Restarts the peak counters: VmHWM of this process (Linux only) and CUDA's counter."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def process_peak() -> int:
    """Returns the peak resident bytes of this process since `reset_peak`; without /proc, since the process started."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return _bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def children_peak() -> int:
    """Returns the peak resident bytes of the largest child process that has ended since this process started."""
    import resource

    return _bytes(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def _bytes(maxrss: int) -> int:
    return maxrss if sys.platform == "darwin" else maxrss * 1024  # macOS counts bytes, Linux kilobytes


def cuda_peak() -> dict[str, float]:
    """Returns peak_cuda_mb: the peak MB that PyTorch allocated on one device since `reset_peak`; {} without CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"peak_cuda_mb": max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**20}
