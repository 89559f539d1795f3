"""Measures wall time and peak memory of one stage of a run."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path


class StageMeter:
    """Measures one stage, starting from the values that earlier processes measured for it."""

    def __init__(self, name: str, before: dict[str, float]) -> None:
        """before: the values of `measured` from earlier processes of the run; empty for a new stage."""
        self.name, self.before = name, before
        self.start = self.saved = time.monotonic()
        self.children = children_peak()
        reset_peak()

    def measured(self) -> dict[str, float]:
        """Returns seconds, peak_memory_mb and, if CUDA was used, peak_cuda_mb so far (MB = 2**20 bytes)."""
        self.saved = time.monotonic()
        children = children_peak()
        peaks = {
            "peak_memory_mb": max(process_peak(), children if children > self.children else 0) / 2**20,
            **cuda_peak(),
        }
        peaks = {key: round(max(value, self.before.get(key, 0)), 1) for key, value in peaks.items()}
        return {"seconds": round(self.before.get("seconds", 0) + self.saved - self.start, 3), **peaks}


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
