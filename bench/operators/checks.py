"""The checks of one operator on a device, each a row: PASS, FAIL or SKIP, why, and seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tadperf.bench.operators import cases, catalogue, engine, report
from tadperf.compute.device import describe_device

Inputs = tuple[Any, ...]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What an H200 is to reach: (operator, shape) -> (figure, bound, at least or below).
BARS = {
    ("per_sample", "1000000x100"): ("share_of_copy", 0.9),
    ("per_sample", "1280000x1000"): ("share_of_copy", 0.9),
    ("trajectory_distance", "64x320010"): ("share_of_copy", 0.9),
    ("mixture", "50000x10"): ("median_ms", 1.0),
    ("mixture", "1280000x1000"): ("median_ms", 5.0),
}


class SkipError(Exception):
    """Why a check does not apply here."""


def row(operator: str, check: str, status: str, detail: str, seconds: float) -> dict[str, Any]:
    return {"operator": operator, "check": check, "status": status, "detail": detail, "seconds": round(seconds, 2)}


def guarded(operator: str, check: str, function: Callable[[], str]) -> dict[str, Any]:
    """The row of a check that says what is wrong, or nothing; an exception is a failure, never the end."""
    start = time.monotonic()
    try:
        detail = function()
        status = "FAIL" if detail else "PASS"
    except SkipError as error:
        status, detail = "SKIP", str(error)
    except Exception as error:
        status, detail = "FAIL", f"{type(error).__name__}: {error}".splitlines()[0]
    return row(operator, check, status, detail, time.monotonic() - start)


def agrees(bench: engine.Bench, inputs: Inputs, truth_on: torch.device | None = None) -> str:
    """Results against the reference's, which may run on another device."""
    truth = bench.reference(*(inputs if truth_on is None else cases.on(truth_on, inputs)))
    return engine.mismatch(truth, call(bench, inputs), bench, bench.providers["tadperf"])


def call(bench: engine.Bench, inputs: Inputs) -> Any:
    return bench.providers["tadperf"].build()(*inputs)


def hard(bench: engine.Bench, device: torch.device) -> str:
    wrong = [agrees(bench, cases.on(device, inputs), torch.device("cpu")) for inputs in cases.HARD[bench.name]()]
    return "; ".join(filter(None, wrong))


def same_bits(first: Any, second: Any) -> str:
    """Which results differ in any bit."""
    pairs = zip(engine.named(first).items(), engine.named(second).values(), strict=True)
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    differ = [
        name
        for (name, a), b in pairs
        if not torch.equal(a.contiguous().view(kinds[a.element_size()]), b.contiguous().view(kinds[b.element_size()]))
    ]
    return f"bits differ: {', '.join(differ)}" if differ else ""


def replay(bench: engine.Bench, size: engine.Size, device: torch.device) -> str:
    """A captured call, replayed after other values were copied into its inputs, against the call on those values."""
    if device.type != "cuda":
        raise SkipError("CUDA graphs are for CUDA")
    inputs, others = (bench.inputs(size, torch.float32, device, seed) for seed in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(bench, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(bench, inputs)
    for mine, other in zip(inputs, others, strict=True):
        if isinstance(mine, Tensor):
            mine.copy_(other)
    graph.replay()
    return same_bits(call(bench, inputs), results)


def compiled(bench: engine.Bench, inputs: Inputs) -> str:
    function = bench.providers["tadperf"].build()
    results = torch.compile(lambda *arguments: engine.named(function(*arguments)), fullgraph=True)(*inputs)
    return engine.mismatch(function(*inputs), results, bench)


def gradient(bench: engine.Bench, inputs: Inputs) -> str:
    """Gradient of a sum of results with respect to the first input, against the reference's by autograd."""
    if bench.name not in cases.GRADIENTS:
        raise SkipError("no result has a gradient")
    found = []
    for function in (bench.reference, bench.providers["tadperf"].build()):
        x = inputs[0].clone().requires_grad_()
        getattr(function(x, *inputs[1:]), cases.GRADIENTS[bench.name]).sum().backward()
        found.append(x.grad)
    error = ((found[1] - found[0]).norm() / found[0].norm()).item()
    return "" if error < 5e-4 else f"relative error {error:.1e}"


def huge(bench: engine.Bench, device: torch.device) -> str:
    """More than 2^31 elements: the last rows against the reference on them alone."""
    if bench.name not in cases.HUGE or device.type != "cuda":
        raise SkipError("for CUDA, and operators whose rows are independent")
    size = cases.HUGE[bench.name]
    needed = 3 * bench.moved(size, torch.float32)
    if needed > torch.cuda.mem_get_info()[0]:
        raise SkipError(f"takes {needed / 2**30:.0f} GiB of memory")
    inputs = bench.inputs(size, torch.bfloat16, device, 0)
    results = {name: value[-100:] for name, value in engine.named(call(bench, inputs)).items()}
    return engine.mismatch(bench.reference(*cases.last(bench.name, inputs, 100)), results, bench)


def run(bench: engine.Bench, device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """All checks, then all measurements with their bars."""
    small = cases.SMALL[bench.name]
    sizes = bench.sizes["cuda"] if device.type == "cuda" else (small,)
    made = bench.inputs(small, torch.float32, device, 0)
    checked: dict[str, Callable[[], str]] = {"hard values": partial(hard, bench, device)}
    checked["no samples"] = lambda: agrees(bench, cases.empty(bench.name, made))
    checked["gradient"] = partial(gradient, bench, made)
    checked["torch.compile"] = partial(compiled, bench, made)
    checked["CUDA graph"] = partial(replay, bench, sizes[0], device)
    checked["same bits"] = lambda: same_bits(
        *(call(bench, bench.inputs(sizes[0], torch.float32, device, 0)) for _ in "12")
    )
    for size in sizes:
        for dtype in DTYPES if size == sizes[0] else DTYPES[:1]:
            name = f"{'x'.join(map(str, size))} {str(dtype).removeprefix('torch.')}"
            checked[name] = lambda s=size, d=dtype: agrees(bench, bench.inputs(s, d, device, 0))
    checked["over 2^31"] = partial(huge, bench, device)
    for name, function in checked.items():
        yield guarded(bench.name, name, function)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for size in sizes:
        yield from measured(bench, size, device, quick)


def measured(bench: engine.Bench, size: engine.Size, device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Rows of figures of one size, and of its bar."""
    names = catalogue.providers(bench, "none" if quick or device.type == "cpu" else "eager,inductor")
    repeats = 20 if device.type == "cuda" else 3
    rows: list[engine.Row] = []

    def measure() -> str:
        rows.extend(engine.measure(bench, size, torch.float32, device, names, repeats))
        shape = rows[0]["shape"]
        if rows[0]["error"] or device.type == "cpu" or (bench.name, shape) not in BARS:
            return rows[0]["error"] or ""
        figure, bound = BARS[bench.name, shape]
        value = rows[0][figure]
        reached = value >= bound if figure == "share_of_copy" else value < bound
        return "" if reached else f"{figure} is {value:.3g}, to be {'at least' if value < bound else 'below'} {bound}"

    yield guarded(bench.name, f"speed {'x'.join(map(str, size))}", measure)
    yield from (row | report.facts(bench.name, device, torch.get_num_threads(), "gpu_check") for row in rows)


def small_calls(device: torch.device) -> None:
    """One small call of each operator: what compute-sanitizer looks at."""
    for name in catalogue.NAMES:
        bench = catalogue.load(name)
        call(bench, bench.inputs(cases.SMALL[name], torch.float32, device, 0))
        if name in cases.GRADIENTS:
            gradient(bench, bench.inputs(cases.SMALL[name], torch.float32, device, 0))
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(name: str, device: torch.device, quick: bool) -> None:
    """Prints the rows of one operator as lines of JSON, each as soon as it is known."""
    if name == "small":
        small_calls(device)
        return
    for found in run(catalogue.load(name), device, quick):
        print(json.dumps(found), flush=True)


def facts(device: torch.device) -> dict[str, Any]:
    """What the device is."""
    made: dict[str, Any] = {"device": describe_device(device), "torch": str(torch.__version__)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        made["capability"] = f"{properties.major}.{properties.minor}"
        made["multiprocessors"] = properties.multi_processor_count
        made["memory_gib"] = round(properties.total_memory / 2**30, 1)
        made["l2_mib"] = round(properties.L2_cache_size / 2**20, 1)
    return made


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as aligned text."""
    return [f"{r['status']}  {r['operator']:<20} {r['check']:<24} {r['seconds']:7.2f} s  {r['detail']}" for r in rows]
