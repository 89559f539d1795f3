"""Times on a CUDA device: a graph of calls on inputs that its cache cannot hold, wall time, launches, peak memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tadperf.bench.operators import engine

CACHES = 4  # the rotated inputs are together this many times as large as the L2 cache
MOST = 256  # sets of inputs, and so calls in one graph


def measure(
    bench: engine.Bench,
    size: engine.Size,
    dtype: torch.dtype,
    device: torch.device,
    functions: Mapping[str, Callable[..., Any]],
    repeats: int,
) -> dict[str, engine.Row]:
    """Figures by provider, `error` where one failed; one after another, as all their graphs at once might not fit."""
    moved = bench.moved(size, dtype)
    sets = [bench.inputs(size, dtype, device, seed) for seed in range(rotation(moved, l2_bytes(device)))]
    copy, copy_bytes = engine.copied(device)
    bandwidth = copy_bytes / float(np.median(replayed(copy, [()], repeats))) / 1e6
    del copy
    found: dict[str, engine.Row] = {}
    for name, function in functions.items():
        torch.cuda.empty_cache()
        try:
            values = engine.figures(replayed(function, sets, repeats), moved, bandwidth)
            found[name] = values | {
                "wall_ms": wall(function, sets, repeats),
                "launches": launches(function, sets[0]),
                "peak_mb": peak(function, sets[0]),
            }
        except Exception as error:  # out of memory, most likely: the others are still measured
            found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return found


def l2_bytes(device: torch.device) -> int:
    """Size of the device's second-level cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def rotation(moved: int, cache: int) -> int:
    """How many sets of inputs to rotate: at least two, so that none is still in the cache when its turn comes."""
    return min(max(2, math.ceil(CACHES * cache / moved)), MOST)


def replayed(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], repeats: int) -> np.ndarray:
    """Milliseconds a call of a CUDA graph that calls `function` on each set: [repeats].

    A function that cannot be captured, as it waits for the device, is timed by events around the same calls.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for arguments in sets[:3]:
            function(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = [function(*arguments) for arguments in sets]  # kept: each call writes memory of its own
        run = graph.replay
    except Exception:
        torch.cuda.synchronize()
        results = None

        def run() -> None:
            for arguments in sets:
                function(*arguments)

    times = [_elapsed(run) / len(sets) for _ in range(repeats + 2)][2:]
    del results
    return np.array(times)


def _elapsed(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def wall(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], repeats: int) -> float:
    """Median milliseconds from the call in Python to the end on the device, without a graph."""
    times = []
    for turn in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function(*sets[turn % len(sets)])
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times))


def launches(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int | None:
    """Kernels that one call starts, copies and fills of memory apart; None where the profiler sees nothing."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function(*arguments)
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]
    kernels = [
        event.name
        for event in profile.events() or ()
        if event.device_type == device and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return len(kernels) or None


def peak(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """MB that one call allocates at most, results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*arguments)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
