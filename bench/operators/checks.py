"""Checks one operator on a device. Each check is a row: PASS, FAIL or SKIP, the reason, and seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tadperf.bench.operators import cases, catalogue, engine, report
from tadperf.bench.operators.goals import BARS
from tadperf.bench.operators.measure import measure_case
from tadperf.compute.device import describe_device

Inputs = tuple[Any, ...]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SkipError(Exception):
    """The check does not apply here; the text says why."""


def row(operator: str, check: str, status: str, detail: str, seconds: float) -> dict[str, Any]:
    return {"operator": operator, "check": check, "status": status, "detail": detail, "seconds": round(seconds, 2)}


def run_check(operator: str, check: str, function: Callable[[], str]) -> dict[str, Any]:
    """Runs a check and returns its row. The check returns what is wrong, or an empty text; an exception is a FAIL."""
    start = time.monotonic()
    try:
        detail = function()
        status = "FAIL" if detail else "PASS"
    except SkipError as error:
        status, detail = "SKIP", str(error)
    except Exception as error:
        status, detail = "FAIL", f"{type(error).__name__}: {error}".splitlines()[0]
    return row(operator, check, status, detail, time.monotonic() - start)


def compare_with_reference(bench: engine.Bench, inputs: Inputs, truth_on: torch.device | None = None) -> str:
    """Compares the results with those of the reference, which may run on another device."""
    truth = bench.reference(*(inputs if truth_on is None else cases.to_device(truth_on, inputs)))
    return engine.mismatch(truth, run_operator(bench, inputs), bench, bench.providers["tadperf"])


def run_operator(bench: engine.Bench, inputs: Inputs) -> Any:
    return bench.providers["tadperf"].build()(*inputs)


def check_hard_values(bench: engine.Bench, device: torch.device) -> str:
    cpu = torch.device("cpu")
    wrong = [compare_with_reference(bench, cases.to_device(device, i), cpu) for i in cases.HARD[bench.name]()]
    return "; ".join(filter(None, wrong))


def compare_bits(first: Any, second: Any) -> str:
    """Returns the names of the results that differ in any bit."""
    pairs = zip(engine.results_by_name(first).items(), engine.results_by_name(second).values(), strict=True)
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    differ = [
        name
        for (name, a), b in pairs
        if not torch.equal(a.contiguous().view(kinds[a.element_size()]), b.contiguous().view(kinds[b.element_size()]))
    ]
    return f"bits differ: {', '.join(differ)}" if differ else ""


def check_cuda_graph(bench: engine.Bench, size: engine.Size, device: torch.device) -> str:
    """Captures a call, copies new values into its inputs, replays it, and compares the results with a direct call."""
    if device.type != "cuda":
        raise SkipError("CUDA graphs need CUDA")
    if bench.name in cases.WAITS:
        raise SkipError("reads sizes from the device")
    inputs, others = (bench.inputs(size, torch.float32, device, seed) for seed in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_operator(bench, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run_operator(bench, inputs)
    for target, source in zip(inputs, others, strict=True):
        if isinstance(target, Tensor):
            target.copy_(source)
    graph.replay()
    return compare_bits(run_operator(bench, inputs), results)


def check_compiled(bench: engine.Bench, inputs: Inputs) -> str:
    function = bench.providers["tadperf"].build()
    results = torch.compile(lambda *arguments: engine.results_by_name(function(*arguments)), fullgraph=True)(*inputs)
    return engine.mismatch(function(*inputs), results, bench)


def check_dispatcher(bench: engine.Bench, inputs: Inputs) -> str:
    """Runs under a profiler, so through PyTorch's dispatcher, which refuses results that share memory."""
    direct = run_operator(bench, inputs)
    with torch.autograd.profiler.profile():
        return compare_bits(direct, run_operator(bench, inputs))


def check_gradient(bench: engine.Bench, inputs: Inputs) -> str:
    """Compares the gradient of a result's sum with respect to the first input with autograd through the reference."""
    if bench.name not in cases.GRADIENTS:
        raise SkipError("no result has a gradient")
    gradients = []
    for function in (bench.reference, bench.providers["tadperf"].build()):
        x = inputs[0].clone().requires_grad_()
        getattr(function(x, *inputs[1:]), cases.GRADIENTS[bench.name]).sum().backward()
        gradients.append(x.grad)
    error = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    return "" if error < 5e-4 else f"relative error {error:.1e}"


def check_huge(bench: engine.Bench, device: torch.device) -> str:
    """Runs on more than 2^31 elements and compares the last rows with the reference on those rows."""
    if bench.name not in cases.HUGE or device.type != "cuda":
        raise SkipError("runs only on CUDA, for operators with independent rows")
    size = cases.HUGE[bench.name]
    needed = 3 * bench.moved(size, torch.float32)
    if needed > torch.cuda.mem_get_info()[0]:
        raise SkipError(f"needs {needed / 2**30:.0f} GiB of memory")
    inputs = bench.inputs(size, torch.bfloat16, device, 0)
    results = {name: value[-100:] for name, value in engine.results_by_name(run_operator(bench, inputs)).items()}
    return engine.mismatch(bench.reference(*cases.last_rows(bench.name, inputs, 100)), results, bench)


def run(bench: engine.Bench, device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Yields the rows of all checks, then of all measurements with their goals."""
    small = cases.SMALL[bench.name]
    sizes = bench.sizes["cuda"] if device.type == "cuda" else (small,)
    inputs = bench.inputs(small, torch.float32, device, 0)
    check: dict[str, Callable[[], str]] = {"hard values": partial(check_hard_values, bench, device)}
    check["no samples"] = lambda: compare_with_reference(bench, cases.without_samples(bench.name, inputs))
    check["gradient"] = partial(check_gradient, bench, inputs)
    check["dispatcher"] = partial(check_dispatcher, bench, inputs)
    check["torch.compile"] = partial(check_compiled, bench, inputs)
    check["CUDA graph"] = partial(check_cuda_graph, bench, sizes[0], device)
    check["same bits"] = lambda: compare_bits(
        *(run_operator(bench, bench.inputs(sizes[0], torch.float32, device, 0)) for _ in "12")
    )
    for size in sizes:
        for dtype in DTYPES if size == sizes[0] else DTYPES[:1]:
            name = f"{'x'.join(map(str, size))} {str(dtype).removeprefix('torch.')}"
            check[name] = lambda s=size, d=dtype: compare_with_reference(bench, bench.inputs(s, d, device, 0))
    check["over 2^31"] = partial(check_huge, bench, device)
    for name, function in check.items():
        yield run_check(bench.name, name, function)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for size in sizes:
        yield from measure_size(bench, size, device, quick)


def measure_size(bench: engine.Bench, size: engine.Size, device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Yields the row of a size's goal, then its rows of figures."""
    names = catalogue.providers(bench, "none" if quick or device.type == "cpu" else "eager,inductor")
    repeats = 20 if device.type == "cuda" else 3
    rows: list[engine.Row] = []

    def measure() -> str:
        rows.extend(measure_case(bench, size, torch.float32, device, names, repeats))
        shape = rows[0]["shape"]
        if rows[0]["error"] or device.type == "cpu" or (bench.name, shape) not in BARS:
            return rows[0]["error"] or ""
        figure, bound = BARS[bench.name, shape]
        value = rows[0][figure]
        is_reached = value >= bound if figure == "share_of_copy" else value < bound
        return "" if is_reached else f"{figure} is {value:.3g}, goal {'at least' if value < bound else 'below'} {bound}"

    yield run_check(bench.name, f"speed {'x'.join(map(str, size))}", measure)
    yield from (row | report.facts(bench.name, device, torch.get_num_threads(), "gpu_check") for row in rows)


def small_calls(device: torch.device) -> None:
    """Makes one small call of each operator, for compute-sanitizer."""
    for name in catalogue.NAMES:
        bench = catalogue.load(name)
        run_operator(bench, bench.inputs(cases.SMALL[name], torch.float32, device, 0))
        if name in cases.GRADIENTS:
            check_gradient(bench, bench.inputs(cases.SMALL[name], torch.float32, device, 0))
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(name: str, device: torch.device, quick: bool) -> None:
    """Prints each row of one operator as a line of JSON as soon as it is known."""
    if name == "small":
        small_calls(device)
        return
    for result in run(catalogue.load(name), device, quick):
        print(json.dumps(result), flush=True)


def facts(device: torch.device) -> dict[str, Any]:
    """Returns the properties of the device."""
    properties_by_name: dict[str, Any] = {"device": describe_device(device), "torch": str(torch.__version__)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        properties_by_name["capability"] = f"{properties.major}.{properties.minor}"
        properties_by_name["multiprocessors"] = properties.multi_processor_count
        properties_by_name["memory_gib"] = round(properties.total_memory / 2**30, 1)
        properties_by_name["l2_mib"] = round(properties.L2_cache_size / 2**20, 1)
    return properties_by_name


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the rows as aligned text."""
    return [f"{r['status']}  {r['operator']:<20} {r['check']:<24} {r['seconds']:7.2f} s  {r['detail']}" for r in rows]
