"""Times an operator beside what one would otherwise run: `measure` turns one case into rows of figures.

A bench file says what its operator is (`Bench`): the inputs of a size, the bytes that must move, who computes it. A
provider whose results differ from the tests' reference is not timed. On a CPU the providers take turns, so that a
machine that slows down slows all of them; on a GPU a CUDA graph is replayed over inputs that its cache cannot hold.
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
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes of the copied buffer: far beyond any cache
SHORTEST = 1.0  # ms that one turn of a provider takes at least; shorter calls are repeated within it
PATIENCE = 10.0  # seconds after which a provider takes no more turns, from its third on; a longer call is its only one


class Provider(NamedTuple):
    """One way to compute an operator's results."""

    family: str  # "tadperf", or one of FAMILIES
    build: Callable[[], Callable[..., Any]]  # the function, compiled or imported only where it is wanted
    package: str = ""  # of a peer, which runs on the CPU alone
    limit: float = math.inf  # the largest product of a size that it is tried on
    tolerance: tuple[float, float] | None = None  # its own, for a peer that stops early
    slack: float = 0.0  # the share of its results that may lie outside of it


class Bench(NamedTuple):
    """What a bench file says of its operator."""

    name: str
    axes: tuple[str, ...]  # what the numbers of a size are
    sizes: dict[str, tuple[Size, ...]]  # measured by default, by type of device
    inputs: Callable[[Size, torch.dtype, torch.device, int], tuple[Any, ...]]  # of a seed
    moved: Callable[[Size, torch.dtype], int]  # bytes: every input read once, every result written once
    reference: Callable[..., Any]  # the truth of the operator's tests
    providers: dict[str, Provider]
    tolerance: dict[str, tuple[float, float] | None]  # relative and absolute, by float result; None is not compared


def plain(forms: Mapping[str, Callable[..., Any]]) -> dict[str, Provider]:
    """Plain forms as providers, each as it is and compiled: {"": f, "x": g} -> eager, eager-x, inductor, inductor-x."""
    made: dict[str, Provider] = {}
    for family, wrap in (("eager", lambda form: form), ("inductor", torch.compile)):
        for name, form in forms.items():
            made["-".join(filter(None, (family, name)))] = Provider(family, lambda w=wrap, f=form: w(f))
    return made


def skip_reason(provider: Provider, size: Size | None = None, device: str = "cpu") -> str:
    """Why this provider does not run, in a few words; empty where it does."""
    if provider.package and device != "cpu":
        return "runs on the CPU alone"
    if provider.package and importlib.util.find_spec(provider.package) is None:
        return f"not installed: pip install 'tadperf[peers]' brings {provider.package}"
    if size and math.prod(size) > provider.limit:
        return "would take minutes at this size"
    return ""


def named(results: Any) -> dict[str, Tensor]:
    """Results by name, from a NamedTuple or a dict."""
    return dict(results) if isinstance(results, dict) else results._asdict()


def mismatch(truth: Any, found: Any, bench: Bench, provider: Provider | None = None) -> str:
    """What differs beyond the tolerance, in one line; empty where all results that `found` has agree.

    Of integers, 1e-4 may differ: which of two candidates is first may hang on the last bit of a float.
    """
    expected = named(truth)
    own, slack = (provider.tolerance, provider.slack) if provider else (None, 0.0)
    for name, value in named(found).items():
        limits = own or bench.tolerance.get(name, (0.0, 0.0))
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
    """Within, PyTorch and the libraries of the peers use this many threads."""
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
    """Milliseconds a call by name: [repeats], fewer for one that used up its patience.

    The functions take turns, each round beginning with another one, so that none always follows the same neighbour.
    """
    first = {name: _milliseconds(function, 1) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    everyone = list(functions.items())
    for turn in range(repeats):
        begin = turn % max(len(everyone), 1)
        for name, function in everyone[begin:] + everyone[:begin]:
            calls = max(1, math.ceil(SHORTEST / max(first[name], 1e-4)))
            spent = first[name] + calls * sum(times[name])
            if spent < patience * 1e3 or (len(times[name]) < 3 and first[name] < patience * 1e3):
                times[name].append(_milliseconds(function, calls))
    return {name: np.array(values or [first[name]]) for name, values in times.items()}


def _milliseconds(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) * 1e3 / calls


def copied(device: torch.device) -> tuple[Callable[[], object], int]:
    """A large copy and the bytes that it moves, read and written."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * COPIED[device.type]


def figures(times: np.ndarray, moved: int, bandwidth: float) -> Row:
    """Quantiles in ms, GB/s, and the share of the copy's bandwidth in GB/s."""
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
    """Adds to each row of one case how many times faster it is than the fastest eager and compiled form."""
    for family in ("eager", "inductor"):
        medians = [row["median_ms"] for row in rows if row["family"] == family and row["median_ms"]]
        for row in rows:
            row[f"over_{family}"] = min(medians) / row["median_ms"] if medians and row["median_ms"] else None


def checked(
    bench: Bench, names: Sequence[str], size: Size, inputs: tuple[Any, ...]
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """The providers that run here and agree with the reference, and why the others do not."""
    functions: dict[str, Callable[..., Any]] = {}
    errors: dict[str, str] = {}
    device = inputs[0].device
    truth = bench.reference(*inputs)
    for name in names:
        provider = bench.providers[name]
        if skip_reason(provider, size, device.type):
            continue
        try:
            function = provider.build()
            wrong = mismatch(truth, function(*inputs), bench, provider)
        except Exception as error:  # one that fails is a row, the others are measured
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        if wrong:
            errors[name] = wrong
        else:
            functions[name] = function
    return functions, errors


def measure(
    bench: Bench, size: Size, dtype: torch.dtype, device: torch.device, names: Sequence[str], repeats: int
) -> list[Row]:
    """Rows of one case, tadperf's first; a provider that failed or disagreed has `error` and no figures."""
    torch.compiler.reset()  # else the second size would be compiled for any size
    with torch.inference_mode():
        inputs = bench.inputs(size, dtype, device, 0)
        functions, errors = checked(bench, names, size, inputs)
        if device.type == "cuda":
            from tadperf.bench.operators import cuda  # pyright: ignore[reportMissingImports]

            found = cuda.measure(bench, size, dtype, device, functions, repeats)
        else:
            found = _on_cpu(bench, size, dtype, inputs, functions, repeats)
    case = {"operator": bench.name, "shape": "x".join(map(str, size)), "dtype": str(dtype).removeprefix("torch.")}
    empty = dict.fromkeys(("median_ms", "q20_ms", "q80_ms", "gb_s", "share_of_copy", "wall_ms", "launches", "peak_mb"))
    rows = []
    for name in names:
        if name in functions or name in errors:
            values = {**empty, "error": errors.get(name), **found.get(name, {})}
            rows.append({**case, "provider": name, "family": bench.providers[name].family, **values})
    ratios(rows)
    return rows


def _on_cpu(
    bench: Bench,
    size: Size,
    dtype: torch.dtype,
    inputs: tuple[Any, ...],
    functions: Mapping[str, Callable[..., Any]],
    repeats: int,
) -> dict[str, Row]:
    from tadperf.bench.stages import peak  # pyright: ignore[reportMissingImports]

    copy, copy_bytes = copied(torch.device("cpu"))
    turns: dict[str, Callable[[], object]] = {name: lambda f=f: f(*inputs) for name, f in functions.items()}
    times = interleaved(turns, repeats)
    # apart from the turns: it would leave the caches empty to whoever comes next
    bandwidth = copy_bytes / float(np.median(interleaved({"copy": copy}, repeats)["copy"])) / 1e6
    quick = [name for name, values in times.items() if np.median(values) < 2e3]
    peaks = peak.ask(bench.name, size, dtype, quick)
    return {
        name: {**figures(values, bench.moved(size, dtype), bandwidth), "peak_mb": peaks.get(name)}
        for name, values in times.items()
    }
