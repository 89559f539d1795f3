"""Measures on a CUDA device: time in a CUDA graph over inputs larger than the cache, wall time, launches, memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tadperf.bench.operators import engine

CACHES = 4  # total size of the rotated inputs, as a multiple of the L2 cache; not tuned
MAX_SETS = 256  # sets of inputs, and calls in one graph; not tuned


def measure(
    bench: engine.Bench,
    size: engine.Size,
    dtype: torch.dtype,
    device: torch.device,
    functions: Mapping[str, Callable[..., Any]],
    repeats: int,
) -> dict[str, engine.Row]:
    """Returns the figures or the `error` of each provider. Measures one at a time: all graphs together may not fit."""
    moved = bench.moved(size, dtype)
    sets = [bench.inputs(size, dtype, device, seed) for seed in range(rotation(moved, l2_bytes(device)))]
    copy, copy_bytes = engine.large_copy(device)
    bandwidth = copy_bytes / float(np.median(replayed(copy, [()], repeats))) / 1e6
    del copy
    rows: dict[str, engine.Row] = {}
    for name, function in functions.items():
        torch.cuda.empty_cache()
        try:
            values = engine.figures(replayed(function, sets, repeats), moved, bandwidth)
            rows[name] = values | {
                "wall_ms": wall(function, sets, repeats),
                "launches": launches(function, sets[0]),
                "peak_mb": peak(function, sets[0]),
            }
        except Exception as error:  # probably out of memory; the others are still measured
            rows[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return rows


def l2_bytes(device: torch.device) -> int:
    """Returns the bytes of the device's second-level cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def rotation(moved: int, cache: int) -> int:
    """Returns the number of input sets to rotate, at least two, so that a set has left the cache before its turn."""
    return min(max(2, math.ceil(CACHES * cache / moved)), MAX_SETS)


def replayed(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], repeats: int) -> np.ndarray:
    """Returns milliseconds per call [repeats] of a CUDA graph that calls `function` on each set.

    A function that waits for the device cannot be captured; events around the same calls time it.
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
            results = [function(*arguments) for arguments in sets]  # kept, so that each call writes its own memory
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
    """Returns the median milliseconds from the call in Python to the end on the device, without a graph."""
    times = []
    for turn in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function(*sets[turn % len(sets)])
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times))


def launches(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int | None:
    """Returns the number of kernels that one call starts, without copies and fills; None if the profiler sees none."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function(*arguments)
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    kernels = [
        event.name
        for event in profile.events() or ()
        if event.device_type == device and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return len(kernels) or None


def peak(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Returns the peak MB that one call allocates, including its results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*arguments)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
