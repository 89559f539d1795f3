"""The measuring stages of `gpu_plan.sh`: `python -m tadperf.bench.tools.gpu_plan STAGE FOLDER DEVICE [OPERATOR]`.

Every stage writes its results into FOLDER as soon as they are known, so a stage that is killed keeps what it had. A
measurement that fails becomes a result with the error as its text.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tadperf.bench.operators import cases, catalogue, checks, engine, goals, measure, report
from tadperf.bench.stages import experts, matching, published_training
from tadperf.bench.tools.gpu_page import CONVOLUTION_TIMES, MODES
from tadperf.compute.cuda_graphs import GraphedStep
from tadperf.compute.torch_settings import torch_settings
from tadperf.kernels import mixture
from tadperf.matching import cuda_graph_sweep, gradient, step_backends
from tadperf.nets import fused, training
from tadperf.nets.architectures import build
from tadperf.nets.fused import fused_forward
from tadperf.nets.optimiser import sgd_step

Facts = dict[str, Any]
T = TypeVar("T")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(function: Callable[[], object], device: torch.device, calls: int = 20) -> float:
    """Returns the milliseconds of one call in a row of calls: the rate of a full queue."""
    for _ in range(3):
        function()
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3 / calls


def save(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value, indent=1, default=str))


def record(facts: Facts, name: str, function: Callable[[], object]) -> None:
    """Adds one result to the facts, or the error of the function."""
    start = time.perf_counter()
    try:
        facts[name] = function()
    except Exception as error:  # one failed measurement must not hide the others
        facts[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:500]}
    print(f"{name}: {facts[name]} ({time.perf_counter() - start:.1f} s)", flush=True)


def profile(function: Callable[[], object], device: torch.device, longest: int = 25) -> Facts:
    """Returns the number of kernels of one call, their milliseconds, and the longest ones."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
    function()
    synchronise(device)
    with profiler(activities=activities) as result:
        function()
        synchronise(device)
    rows: dict[str, tuple[int, float]] = {}
    for event in result.events() or ():
        if (event.device_type == torch.autograd.DeviceType.CUDA) == on_cuda:
            calls, spent = rows.get(event.name, (0, 0.0))
            rows[event.name] = calls + 1, spent + event.time_range.elapsed_us() / 1e3
    ordered = sorted(rows.items(), key=lambda item: -item[1][1])
    return {
        "kernels": sum(calls for calls, _ in rows.values()),
        "busy_ms": round(sum(spent for _, spent in rows.values()), 3),
        "longest": [{"name": n[:100], "calls": c, "ms": round(ms, 4)} for n, (c, ms) in ordered[:longest]],
    }


def measure_facts(folder: Path, device: torch.device) -> None:
    """Measures the copy bandwidth, matrix products, and the convolutions of the ConvNet of width 128."""
    facts: Facts = report.machine_facts(device, torch.get_num_threads(), "gpu_plan") | checks.facts(device)
    copy, moved = engine.large_copy(device)
    record(facts, "copy_gb_s", lambda: round(moved / milliseconds(copy, device, 10) / 1e6, 1))
    side = 8192 if device.type == "cuda" else 256
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("ieee", torch.float32, False),
    ):
        x = torch.randn(side, side, device=device, dtype=dtype)
        with torch_settings(tf32=tf32):
            record(
                facts,
                f"matmul_{name}_tflop_s",
                lambda x=x: round(2 * side**3 / milliseconds(lambda: x @ x, device, 10) / 1e9, 1),
            )
    save(folder, "facts.json", facts)
    for benchmark in (False, True):
        for channels, size in ((3, 32), (4, 32), (128, 16), (128, 8)):
            for dtype in (torch.float32, torch.bfloat16):
                name = f"convolution {channels}x{size} {str(dtype)[6:]}" + " cudnn.benchmark" * benchmark
                with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=True):
                    record(facts, name, lambda a=(channels, size, dtype): convolution_ms(*a, device))
                save(folder, "facts.json", facts)


def convolution_ms(channels: int, size: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Returns the milliseconds of a 3 x 3 convolution to 128 channels, channels last, and of both gradients."""
    images = 256 if device.type == "cuda" else 4

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    x, w, g = random(images, channels, size, size), random(128, channels, 3, 3), random(images, 128, size, size)

    def backward(mask: list[bool]) -> object:
        ones = [1, 1]
        return torch.ops.aten.convolution_backward(g, x, w, None, ones, ones, ones, False, [0, 0], 1, mask)

    functions = (
        lambda: torch.conv2d(x, w, padding=1),
        lambda: backward([True, False, False]),
        lambda: backward([False, True, False]),
    )
    times = [round(milliseconds(function, device), 4) for function in functions]
    return dict(zip(CONVOLUTION_TIMES, times, strict=True))


def check_operator(folder: Path, device: torch.device, name: str) -> None:
    """Runs the checks of one operator, without its timings and without the check that needs most of the memory."""
    cases.HUGE.clear()  # other checks use the device at the same time
    with (folder / f"checks-{name}.jsonl").open("w") as file:
        for row in checks.run(catalogue.load(name), device, True):
            file.write(json.dumps(row) + "\n")
            file.flush()
            if row["check"] == "over 2^31":
                break


def check_huge(folder: Path, device: torch.device) -> None:
    """Runs operators on more than 2^31 elements."""
    with (folder / "huge.jsonl").open("w") as file:
        for name in cases.HUGE:
            row = checks.run_check(name, "over 2^31", lambda n=name: checks.check_huge(catalogue.load(n), device))
            file.write(json.dumps(row) + "\n")
            file.flush()
            if device.type == "cuda":
                torch.cuda.empty_cache()


@torch_settings(tf32=True)
def measure_matching(folder: Path, device: torch.device) -> None:
    """Measures one iteration with every form, then profiles two steps."""
    on_cuda = device.type == "cuda"
    case = matching.SIZES["cifar10-ipc10" if on_cuda else "digits"]
    facts: Facts = {"case": str(case)}
    truth = matching.true_gradient(case._replace(steps=3), device)

    def sweep(make: Callable[..., step_backends.StepBackend]) -> Callable[..., Callable[[], Tensor]]:
        def build_call(p: matching.MatchingProblem) -> Callable[[], Tensor]:
            if not on_cuda:
                backend = make(p.net)
                return lambda: matching.adjoint(p, backend)
            graphed = cuda_graph_sweep.GraphedSweep(p.net, make(p.net))
            drawn = gradient.StepDraws.join(p.steps)
            return lambda: graphed(*p[1:-1], drawn).images

        return build_call

    bfloat16 = torch.bfloat16
    forms = {
        "formulas, CUDA graph": sweep(step_backends.eager),
        "published": lambda p: lambda: matching.published(p),
        "formulas, images of 4 channels, CUDA graph": lambda p: padded(sweep(step_backends.eager)(p)),
        "compiled, CUDA graph": sweep(step_backends.compiled),
        "formulas, bfloat16, CUDA graph": sweep(lambda net: step_backends.eager(net, bfloat16)),
        "compiled, bfloat16, CUDA graph": sweep(lambda net: step_backends.compiled(net, bfloat16)),
    }
    for name, make in forms.items():
        record(facts, name, lambda make=make: measure_iteration(case, make, truth, device))
        save(folder, "matching.json", facts)
    steps = step_backends.eager
    for name, make in (("float32", steps), ("bfloat16", lambda net: steps(net, bfloat16))):
        call = sweep(make)(matching.make_problem(case, device))
        record(facts, f"kernels of one iteration, formulas, {name}", partial(profile, call, device))
        save(folder, "matching.json", facts)


def measure_iteration(
    case: matching.Case, make: Callable[..., Callable[[], Tensor]], truth: Tensor, device: torch.device
) -> Facts:
    """Returns the times, the peak memory and the gradient's error of one form of the matching iteration.

    truth: the true gradient of the same case with 3 inner steps.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call = make(matching.make_problem(case, device))
    call()
    call()
    synchronise(device)
    row: Facts = {"first_two_calls_s": round(time.perf_counter() - start, 2)}
    times = [milliseconds_once(call, device) for _ in range(5)]
    row |= {"median_ms": round(statistics.median(times), 3), "ms": [round(t, 3) for t in times]}
    if device.type == "cuda":
        row["peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    short = make(matching.make_problem(case._replace(steps=3), device))
    row["gradient_error_t3"] = matching.relative_error(short(), truth)
    return row


def padded(function: Callable[..., T]) -> Callable[..., T]:
    """Returns the function with images padded to 4 channels on CUDA (`fused.PAD_IMAGES_TO`)."""

    def run(*arguments: Any) -> T:
        before, fused.PAD_IMAGES_TO = fused.PAD_IMAGES_TO, 4
        try:
            return function(*arguments)
        finally:
            fused.PAD_IMAGES_TO = before

    return run


def milliseconds_once(function: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3


@torch_settings(tf32=True)
def measure_experts(folder: Path, device: torch.device) -> None:
    """Measures the training of experts, then one step alone, then profiles four steps."""
    case = experts.case_for("cifar10" if device.type == "cuda" else "digits", device)
    images, labels = experts.data(case, device)
    facts: Facts = {"case": str(case)}

    def seconds(fit: Callable[..., object]) -> float:
        module = build(case.net, case.shape, 10, 0).to(device)
        return milliseconds_once(lambda: fit(module, images, labels, case.recipe, 0), device) / 1e3

    samples = case.images * case.recipe.epochs
    fits = {"tadperf": training.fit, "published": published_training.fit}
    for name, fit in (fits | {"tadperf, images of 4 channels": padded(training.fit)}).items():
        seconds(fit)  # compiles and warms up
        record(facts, name, lambda fit=fit: {"images_s": round(samples / min(seconds(fit) for _ in range(2)))})
        save(folder, "experts.json", facts)
    for batch in (64, 100, 256, 1024):
        record(facts, f"step of {batch}", lambda b=batch: measure_step(case, images[:b], labels[:b], device))
        save(folder, "experts.json", facts)
    module = build(case.net, case.shape, 10, 0).to(device)
    few, count = case.recipe._replace(epochs=1), min(len(images), 4 * case.recipe.batch)
    call = partial(training.fit, module, images[:count], labels[:count], few, 0)
    record(facts, "kernels of four steps", partial(profile, call, device))
    save(folder, "experts.json", facts)


def measure_step(case: experts.Case, x: Tensor, y: Tensor, device: torch.device) -> Facts:
    """Returns the milliseconds of a training step with its inputs on the device, eager and as a CUDA graph."""
    module = build(case.net, case.shape, 10, 0).to(device)
    if device.type == "cuda":
        for parameter in module.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    predict, parameters = fused_forward(module), tuple(module.parameters())
    velocity = tuple(map(torch.zeros_like, parameters))

    def step(x: Tensor, y: Tensor) -> None:
        loss = training.batch_loss(predict, x, y, None)
        sgd_step(parameters, velocity, training.summed_gradient([loss], parameters), 0.01, 0.0, 0.0)

    row: Facts = {"eager_ms": round(milliseconds(lambda: step(x, y), device), 4)}
    if device.type == "cuda":
        graphed = GraphedStep(step)
        ms = milliseconds(lambda: graphed(x, y), device)
        row |= {"graph_ms": round(ms, 4), "images_s": round(len(x) / ms * 1e3), "graph_failed": graphed.failed}
        if len(x) == case.recipe.batch:
            row["kernels"] = profile(lambda: graphed(x, y), device)
    return row


def measure_operators(folder: Path, device: torch.device) -> None:
    """Measures every operator against eager, first at the sizes that have a goal. Compiled forms take too long here."""
    on_cuda = device.type == "cuda"
    wanted = [(name, tuple(map(int, shape.split("x")))) for name, shape in goals.BARS] if on_cuda else []
    for name in catalogue.NAMES:
        sizes = catalogue.load(name).sizes["cuda"] if on_cuda else (cases.SMALL[name],)
        wanted += [(name, size) for size in sizes]
    with (folder / "speed.jsonl").open("w") as file:
        for name, size in dict.fromkeys(wanted):
            bench = catalogue.load(name)
            try:
                names = catalogue.providers(bench, "eager")
                rows = measure.measure_case(bench, size, torch.float32, device, names, 10 if on_cuda else 3)
            except Exception as error:
                shape = "x".join(map(str, size))
                rows = [{"operator": name, "shape": shape, "provider": "tadperf", "error": f"{error}"[:300]}]
            file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
            file.flush()
            if on_cuda:
                torch.cuda.empty_cache()
        if on_cuda:
            file.writelines(json.dumps(row) + "\n" for row in mixture_forms(device))


def mixture_forms(device: torch.device) -> list[Facts]:
    """Returns the milliseconds of `mixture` with one program for each group, and with groups in parts."""
    from tadperf.kernels.gpu import mixture as triton

    rows, before = [], triton.ONE_PROGRAM
    for size in ((50_000, 10), (200_000, 10), (1_280_000, 10)):
        inputs = catalogue.load("mixture").inputs(size, torch.float32, device, 0)
        for form, triton.ONE_PROGRAM in (("one program a group", 2**62), ("groups in parts", 0)):
            row: Facts = {"operator": "mixture", "shape": "x".join(map(str, size)), "provider": f"tadperf, {form}"}
            record(row, "median_ms", lambda inputs=inputs: milliseconds(lambda: mixture(*inputs), device, 5))
            rows.append(row)
    triton.ONE_PROGRAM = before
    return rows


def collect_jobs(folder: Path, device: torch.device) -> None:
    """Collects what the folders of the three whole jobs hold so far."""
    jobs: dict[str, Facts] = {}
    for mode in MODES:
        run = folder / f"job-{mode}"
        if not run.exists():
            continue
        facts = jobs[mode] = {"done": (run / "DONE").exists()}
        for name in ("result.json", "stages.json", "env.json"):
            with contextlib.suppress(OSError, ValueError):
                facts[name] = json.loads((run / name).read_text())
        with contextlib.suppress(OSError, ValueError):
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            facts["trust"] = [line for line in lines if line["stage"] == "trust"]
            facts["matching"] = [line for line in lines if line["stage"] == "matching" and "held_out" in line]
        with contextlib.suppress(OSError):
            facts["log"] = (folder / f"job-{mode}.log").read_text()[-3000:]
    save(folder, "jobs.json", jobs)


STAGES: dict[str, Callable[..., None]] = {
    "facts": measure_facts,
    "check": check_operator,
    "matching": measure_matching,
    "experts": measure_experts,
    "speed": measure_operators,
    "huge": check_huge,
    "jobs": collect_jobs,
}


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 3 or arguments[0] not in STAGES:
        print(f"gpu_plan: arguments: STAGE FOLDER DEVICE [OPERATOR]; STAGE is one of {', '.join(STAGES)}")
        return 2
    stage, folder, device, *operator = arguments
    if device == "cpu":
        engine.COPY_BYTES["cpu"] = 2**24  # a rehearsal, not a measurement
    STAGES[stage](Path(folder), torch.device(device), *operator)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
