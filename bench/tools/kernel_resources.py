"""Prints the resources of every Triton kernel as its launcher compiles it. Needs no GPU.

Run `python -m tadperf.bench.tools.kernel_resources [OPERATOR ...] [--sm 90]`. A mock driver compiles each launch with
the arguments of a real call, so the specialisation on strides and alignment is that of a run. Nothing is launched, and
nothing here is a time.

Columns: the grid; warps of a program; registers of a thread; spilled bytes; shared memory of a program in bytes;
occupancy (the share of a multiprocessor's warps that registers and shared memory allow); load and store instructions of
global memory in the machine code, by bits of a thread; the tensor core instruction.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # KB of a multiprocessor that programs can use
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64}  # of a multiprocessor
REGISTERS, PROGRAMS = 65536, 32  # of a multiprocessor
CASE = Callable[[], object]


class Launch(NamedTuple):
    """One kernel as one launch compiles it. `loads` and `stores` count instructions by bits per thread."""

    kernel: str
    case: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    spills: int
    shared: int
    occupancy: float
    loads: dict[int, int]
    stores: dict[int, int]
    product: str


def widths(sass: str, instruction: str) -> dict[int, int]:
    """Counts instructions of global memory by bits per thread: LDG (with LDGSTS, asynchronous copies) or STG."""
    found: Counter[int] = Counter()
    for match in re.finditer(rf"\b{instruction}(?:STS)?\.E([\w.]*)", sass):
        bits = re.findall(r"\.[US]?(8|16|64|128)(?=\.|$)", match[1])
        found[int(bits[0]) if bits else 32] += 1
    return dict(sorted(found.items(), reverse=True))


def occupancy(registers: int, shared: int, warps: int, sm: int) -> float:
    """Returns the share of the warps of a multiprocessor that programs of one kernel can fill."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = SHARED[sm] * 1024 // (shared + 1024)  # 1 KB of each program is reserved
    return min(by_registers, by_shared, WARPS[sm] // warps, PROGRAMS) * warps / WARPS[sm]


def _launch(kernel: Any, name: str, case: str, grid: tuple[int, ...], sm: int) -> Launch:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def dump(option: str, file: str) -> str:
        return subprocess.run([tools / "cuobjdump", option, file], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = dump("-res-usage", file.name), dump("-sass", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    product = next((p for p in ("wgmma", "tcgen05.mma", "mma.sync") if p in kernel.asm["ptx"]), "-")
    return Launch(
        name,
        case,
        grid,
        warps,
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        shared,
        occupancy(numbers["REG"], shared, warps, sm),
        widths(sass, "LDG"),
        widths(sass, "STG"),
        product,
    )


@contextlib.contextmanager
def compiled_launches(sm: int) -> Iterator[list[tuple[Any, str, tuple[int, ...]]]]:
    """Makes every Triton launch compile for compute capability `sm` and return. Collects (kernel, name, grid)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class MockDriver:
        """Describes a GPU that cannot launch."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", sm, 32)

        def get_current_device(self) -> int:
            return sm  # compiled kernels are cached by device

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_device_interface(self) -> Any:
            return torch.cuda

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    found: list[tuple[Any, str, tuple[int, ...]]] = []
    run, guard, before = JITFunction.run, torch.cuda.device_of, driver._active

    def compile_only(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append((kernel, self.fn.__name__, grid))
        return kernel

    driver.set_active(MockDriver())  # pyright: ignore[reportArgumentType]
    JITFunction.run = compile_only
    torch.cuda.device_of = lambda _: contextlib.nullcontext()
    try:
        yield found
    finally:
        JITFunction.run, torch.cuda.device_of = run, guard
        driver._active = before  # reset_active needs a GPU


def per_sample_cases() -> Iterator[tuple[str, CASE]]:
    """Yields a name and a call for each number of classes and each type, forward and gradient."""
    from tadperf.kernels.gpu import per_sample as module

    labels = torch.zeros(64, dtype=torch.int64)
    for classes in (10, 100, 200, 1000, 5000):
        for dtype in (torch.float32, torch.bfloat16):
            x, row = torch.randn(64, classes).to(dtype), torch.ones(64)
            yield f"C {classes} {str(dtype)[6:]}", lambda x=x: module.per_sample(x, labels)
            yield (
                f"C {classes} {str(dtype)[6:]} gradient",
                lambda x=x, row=row: module.loss_gradient(x, labels, row, row, row, torch.empty_like(x)),
            )


def per_sample_linear_cases() -> Iterator[tuple[str, CASE]]:
    """Yields a name and a call for sizes and types of the operator's bench."""
    from tadperf.kernels.gpu import per_sample_linear as module

    for rows, depth, classes in ((20_000, 128, 1000), (2000, 256, 20_000)):
        for dtype in (torch.float32, torch.bfloat16):
            x, w = torch.zeros(rows, depth, dtype=dtype), torch.zeros(classes, depth, dtype=dtype)
            y = torch.zeros(rows, dtype=torch.int64)
            name = f"{rows} x {depth} x {classes} {str(dtype)[6:]}"
            yield name, lambda x=x, w=w, y=y: module.per_sample_linear(x, w, y, None)


def mixture_cases() -> Iterator[tuple[str, CASE]]:
    """Yields a name and a call for few large groups and for many small ones."""
    from tadperf.kernels.gpu import mixture as module

    for count, groups in ((50_000, 10), (1_280_000, 1000), (1_280_000, 10)):
        x, group = torch.rand(count), torch.arange(count) % groups
        yield (
            f"{count} in {groups} groups",
            lambda x=x, g=group, n=groups: module.mixture(x, g, n, 30, 1e-7, 1e-6, True),
        )


def diverse_pick_cases() -> Iterator[tuple[str, CASE]]:
    """Yields a name and a call for the sizes of the operator's bench, with 50 qualified images in a class."""
    from tadperf.kernels.gpu import diverse_pick as module

    for anomalies, choices, width, classes in ((1000, 10, 512, 10), (5000, 10, 512, 100)):
        x, scores = torch.zeros(anomalies, choices, width), torch.zeros(anomalies, choices)
        held, label = torch.zeros(50 * classes, width), torch.arange(anomalies) % classes
        held_label = torch.arange(50 * classes) % classes
        name = f"{anomalies} x {choices} x {width} in {classes} classes"
        yield name, lambda a=(x, scores, held, label, held_label): module.diverse_pick(*a, None, None)


def reliability_cases() -> Iterator[tuple[str, CASE]]:
    """Yields a name and a call for few and many classes, and for half types."""
    from tadperf.kernels.gpu import reliability as module

    for rows, width, classes in ((5000, 512, 10), (2000, 2048, 100), (1000, 512, 1000)):
        x, anchors, cholesky = torch.zeros(rows, width), torch.zeros(classes, width), torch.eye(width)
        yield (
            f"{rows} x {width} x {classes}",
            lambda a=(x, anchors, cholesky): module.reliability(*a),
        )
    half = torch.zeros(1000, 512, dtype=torch.bfloat16), torch.zeros(100, 512), torch.eye(512)
    yield "1000 x 512 x 100 bfloat16", lambda: module.reliability(*half)


def differentiable_augment_cases() -> Iterator[tuple[str, CASE]]:
    """Yields a name and a call of the operator and its adjoint, for both layouts and for images of 64 x 64."""
    from tadperf.kernels.gpu import differentiable_augment as module

    for side in (32, 64):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.zeros(100, 3, side, side).contiguous(memory_format=layout)
            parts = torch.zeros(100, 2, 3), torch.ones(100, 3), torch.zeros(100, 2)
            for launcher in (module.differentiable_augment, module.differentiable_augment_adjoint):
                name = f"3 x {side} x {side} {str(layout).removeprefix('torch.')}"
                yield name, lambda f=launcher, x=x, parts=parts: f(x, *parts, 16)


def norm_relu_pool_dual_cases() -> Iterator[tuple[str, CASE]]:
    """Yields a name and a call of the operator and its reverse for the maps of matching, and for maps without pool."""
    from tadperf.kernels.gpu import norm_relu_pool_dual as module

    for side, pool in ((32, True), (16, True), (8, True), (32, False)):
        for dtype in (torch.float32, torch.bfloat16):
            half = side // 2 if pool else side
            x, y = (
                torch.zeros(2, 64, n, n, dtype=dtype).contiguous(memory_format=torch.channels_last)
                for n in (side, half)
            )
            one, moments = torch.ones(64), torch.empty(4, 2, 64)
            maps, grads, affine = (x, x), (y, y), (one, one, one, one)
            name = f"{side} x {side} {str(dtype)[6:]}{'' if pool else ', no pool'}"
            forward, reverse = module.norm_relu_pool_dual, module.norm_relu_pool_dual_gradient
            yield name, lambda a=(maps, affine, moments, grads), p=pool, f=forward: f(*a, 1e-5, p)
            yield f"{name} reverse", lambda a=(grads, maps, affine, moments, maps), p=pool, f=reverse: f(*a, p)


CASES: dict[str, Callable[[], Iterator[tuple[str, CASE]]]] = {
    "per_sample": per_sample_cases,
    "per_sample_linear": per_sample_linear_cases,
    "mixture": mixture_cases,
    "diverse_pick": diverse_pick_cases,
    "reliability": reliability_cases,
    "differentiable_augment": differentiable_augment_cases,
    "norm_relu_pool_dual": norm_relu_pool_dual_cases,
}


def launches(operators: Sequence[str], sm: int) -> Iterator[Launch]:
    """Yields one row for each kernel of each case that compiles to other code than the cases before it."""
    seen: set[bytes] = set()
    for operator in operators:
        for case, call in CASES[operator]():
            with compiled_launches(sm) as found:
                call()
            for kernel, name, grid in found:
                if kernel.asm["cubin"] not in seen:
                    seen.add(kernel.asm["cubin"])
                    yield _launch(kernel, name, case, grid, sm)


def table_row(launch: Launch) -> str:
    """Returns one row of the table in Markdown."""

    def counts(found: dict[int, int]) -> str:
        return ", ".join(f"{count} of {bits}" for bits, count in found.items()) or "-"

    grid = " x ".join(map(str, launch.grid))
    fields = (
        launch.kernel,
        launch.case,
        grid,
        launch.warps,
        launch.registers,
        launch.spills,
        launch.shared,
        f"{launch.occupancy:.0%}",
        counts(launch.loads),
        counts(launch.stores),
        launch.product,
    )
    return f"| {' | '.join(map(str, fields))} |"


HEADER = (
    "kernel",
    "case",
    "grid",
    "warps",
    "registers",
    "spills",
    "shared",
    "occupancy",
    "loads",
    "stores",
    "product",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", help=f"operators of the table: {', '.join(CASES)}; without one, all")
    parser.add_argument("--sm", type=int, default=90, choices=sorted(SHARED), help="compute capability of the GPU x 10")
    options = parser.parse_args(arguments)
    if unknown := set(options.operators) - set(CASES):
        parser.error(f"unknown operator {sorted(unknown)[0]}; choose from {', '.join(CASES)}")
    import triton

    print(f"Triton {triton.__version__}, sm_{options.sm}\n\n| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}")
    for launch in launches(options.operators or list(CASES), options.sm):
        print(table_row(launch), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
