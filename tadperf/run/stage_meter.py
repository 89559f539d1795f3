"""Wall time and peak memory of one stage of a run."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path


class StageMeter:
    """A running measurement of one stage: seconds and peak memory, on top of what earlier processes measured."""

    def __init__(self, name: str, before: dict[str, float]):
        self.name, self.before = name, before
        self.start = self.saved = time.monotonic()
        self.children = children_peak()
        reset_peak()

    def measured(self) -> dict[str, float]:
        self.saved = time.monotonic()
        children = children_peak()
        values = {
            "peak_memory_mb": max(own_peak(), children if children > self.children else 0) / 2**20,
            **cuda_peak(),
        }
        values = {key: round(max(value, self.before.get(key, 0)), 1) for key, value in values.items()}
        return {"seconds": round(self.before.get("seconds", 0) + self.saved - self.start, 3), **values}


def reset_peak() -> None:
    """Starts the peaks anew where the system can: Linux sets VmHWM back to the present size, CUDA its own counter."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def own_peak() -> int:
    """Peak resident bytes of this process since `reset_peak` (of its whole life where there is no /proc)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return _bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def children_peak() -> int:
    """Peak resident bytes of the largest child process that has ended, over this process's whole life."""
    import resource

    return _bytes(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def _bytes(maxrss: int) -> int:
    return maxrss if sys.platform == "darwin" else maxrss * 1024  # macOS counts bytes, Linux kilobytes


def cuda_peak() -> dict[str, float]:
    """Peak memory in MB that PyTorch allocated on a CUDA device since `reset_peak`; empty where CUDA is not in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"peak_cuda_mb": max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**20}
