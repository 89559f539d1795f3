"""Compares the speed of an operator with other implementations. `measure.py` measures one case.

A bench file describes its operator by a `Bench`: inputs of a size, bytes that must move, and the providers that compute
it. A provider whose results differ from the tests' reference is not timed. On a CPU the providers take turns: if the
machine slows down, it slows all of them. On a GPU a CUDA graph is replayed over inputs that the cache cannot hold.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, ...]
Row = dict[str, Any]
FAMILIES = ("eager", "inductor", "peer")
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}  # bytes of the copied buffer: much larger than any cache
MIN_TURN_MS = 1.0  # a turn repeats the provider's call to last about this long; not tuned
# Seconds, not tuned. A provider that has used them up gets no more turns, but at least three. If its first call takes
# longer than this, that call is the only one.
PATIENCE = 10.0


class Provider(NamedTuple):
    """An implementation of an operator."""

    family: str  # "tadperf", or one of FAMILIES
    build: Callable[[], Callable[..., Any]]  # returns the function; compiles or imports it only then
    package: str = ""  # the package of another library, which runs on the CPU only
    limit: float = math.inf  # runs only on sizes whose product is at most this
    tolerance: tuple[float, float] | None = None  # replaces that of the bench, for a library that stops early
    slack: float = 0.0  # the share of results that may differ by more than the tolerance


class Bench(NamedTuple):
    """The description of an operator by its bench file."""

    name: str
    axes: tuple[str, ...]  # the meaning of the numbers of a size
    sizes: dict[str, tuple[Size, ...]]  # the sizes to measure by default, by type of device
    inputs: Callable[[Size, torch.dtype, torch.device, int], tuple[Any, ...]]  # inputs(size, dtype, device, seed)
    moved: Callable[[Size, torch.dtype], int]  # bytes to move: every input once, every result once
    reference: Callable[..., Any]  # the reference of the operator's tests
    providers: dict[str, Provider]
    tolerance: dict[str, tuple[float, float] | None]  # relative and absolute, by float result; None: not compared


def plain(forms: Mapping[str, Callable[..., Any]]) -> dict[str, Provider]:
    """Returns eager and compiled providers: {"": f, "x": g} gives eager, eager-x, inductor and inductor-x."""
    providers: dict[str, Provider] = {}
    for family, wrap in (("eager", lambda form: form), ("inductor", torch.compile)):
        for name, form in forms.items():
            providers["-".join(filter(None, (family, name)))] = Provider(family, lambda w=wrap, f=form: w(f))
    return providers


def skip_reason(provider: Provider, size: Size | None = None, device: str = "cpu") -> str:
    """Returns why a provider does not run here, in a few words, or an empty text if it runs."""
    if provider.package and device != "cpu":
        return "runs on the CPU only"
    if provider.package and importlib.util.find_spec(provider.package) is None:
        return f"not installed: pip install 'tadperf[peers]' installs {provider.package}"
    if size and math.prod(size) > provider.limit:
        return "would take minutes at this size"
    return ""


def results_by_name(results: Any) -> dict[str, Tensor]:
    """Returns results by name, from a NamedTuple or a dict."""
    return dict(results) if isinstance(results, dict) else results._asdict()


def mismatch(truth: Any, found: Any, bench: Bench, provider: Provider | None = None) -> str:
    """Returns one line about the first result that differs by more than the tolerance; an empty text if all agree.

    Only the results in `found` are compared. A share of 1e-4 of integers may differ: which of two candidates comes
    first can depend on the last bit of a float.
    """
    expected = results_by_name(truth)
    tolerance, slack = (provider.tolerance, provider.slack) if provider else (None, 0.0)
    for name, value in results_by_name(found).items():
        limits = tolerance or bench.tolerance.get(name, (0.0, 0.0))
        if limits is None:
            continue
        wanted = expected[name].to(value.device)
        if value.shape != wanted.shape:
            return f"{name}: {tuple(value.shape)} instead of {tuple(wanted.shape)}"
        if value.is_floating_point():
            wrong = ~torch.isclose(value.double(), wanted.double(), *limits, equal_nan=True)
        else:
            wrong = value != wanted
        if wrong.sum() > max(slack, 0.0 if value.is_floating_point() else 1e-4) * wrong.numel():
            at = int(wrong.flatten().nonzero()[0])
            pair = f"{value.flatten()[at].item()} instead of {wanted.flatten()[at].item()}"
            return f"{name}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: {pair}"
    return ""


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Limits PyTorch and other libraries to this number of threads inside the block."""
    import threadpoolctl

    before = torch.get_num_threads()
    count = count or before
    torch.set_num_threads(count)
    try:
        with threadpoolctl.threadpool_limits(limits=count):
            yield count
    finally:
        torch.set_num_threads(before)


def interleaved(
    functions: Mapping[str, Callable[[], object]], repeats: int, patience: float = PATIENCE
) -> dict[str, np.ndarray]:
    """Returns milliseconds per call [repeats] by name; fewer values for a function that has used up its patience.

    The functions take turns. Each round starts with another function, so no function always follows the same one.
    """
    first = {name: _milliseconds(function, 1) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    entries = list(functions.items())
    for turn in range(repeats):
        begin = turn % max(len(entries), 1)
        for name, function in entries[begin:] + entries[:begin]:
            calls = max(1, math.ceil(MIN_TURN_MS / max(first[name], 1e-4)))
            spent = first[name] + calls * sum(times[name])
            if spent < patience * 1e3 or (len(times[name]) < 3 and first[name] < patience * 1e3):
                times[name].append(_milliseconds(function, calls))
    return {name: np.array(values or [first[name]]) for name, values in times.items()}


def _milliseconds(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) * 1e3 / calls


def large_copy(device: torch.device) -> tuple[Callable[[], object], int]:
    """Returns a function that makes a large copy, and the bytes that it reads and writes."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * COPY_BYTES[device.type]


def figures(times: np.ndarray, moved: int, bandwidth: float) -> Row:
    """Returns quantiles in ms, GB/s, and the share of the bandwidth of a copy. bandwidth: in GB/s."""
    q20, median, q80 = (float(q) for q in np.quantile(times, (0.2, 0.5, 0.8)))
    gb_s = moved / median / 1e6
    return {
        "median_ms": median,
        "q20_ms": q20,
        "q80_ms": q80,
        "rounds": len(times),
        "gb_s": gb_s,
        "copy_gb_s": bandwidth,
        "share_of_copy": gb_s / bandwidth,
    }


def ratios(rows: Sequence[Row]) -> None:
    """Adds to each row of one case how many times faster it is than the fastest eager and compiled provider."""
    for family in ("eager", "inductor"):
        medians = [row["median_ms"] for row in rows if row["family"] == family and row["median_ms"]]
        for row in rows:
            row[f"over_{family}"] = min(medians) / row["median_ms"] if medians and row["median_ms"] else None
