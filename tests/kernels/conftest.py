"""Tests Triton kernels without a GPU: compiles them ahead of time for several GPUs, or runs the interpreter."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    """Tests marked `interpreter` run with TRITON_INTERPRET=1 (test_interpreter.py starts them), the others without."""
    for item in items:
        marked = item.get_closest_marker("interpreter") is not None
        if marked != INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="run by test_interpreter.py" if marked else "interpreting"))


class Resources(NamedTuple):
    """The resources that one compiled kernel needs."""

    registers: int
    shared: int  # bytes
    spills: int  # bytes
    loads: int  # load instructions of global memory; 0 for AMD


@pytest.fixture(scope="session")
def aot(tmp_path_factory):
    """Gives aot(kernel, signature, constexprs, num_warps=4), which compiles for sm_80, sm_90, sm_100 and gfx942.

    It returns {name: Resources}. backend: "cuda" or "hip" compiles for these GPUs only. aligned: pointers and integers
    are multiples of 16, as Triton assumes in a launch with such arguments.
    signature: Triton types by parameter name ("*fp32", "*bf16", "i64"), without the constexprs; constexprs: values.
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    folder = tmp_path_factory.mktemp("cubin")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    targets = [GPUTarget("cuda", sm, 32) for sm in (80, 90, 100)] + [GPUTarget("hip", "gfx942", 64)]

    def resources(compiled, target) -> Resources:
        if target.backend == "hip":
            text = compiled.asm["amdgcn"]
            spills = sum(map(int, re.findall(r"\.(?:s|v)gpr_spill_count:\s*(\d+)", text)))
            registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0])
            return Resources(registers, compiled.metadata.shared, spills, 0)
        file = folder / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([cuobjdump, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        loads, spills = compiled.asm["ptx"].count("ld.global"), numbers["STACK"] + numbers["LOCAL"]
        return Resources(numbers["REG"], compiled.metadata.shared, spills, loads)

    def compile_all(
        kernel,
        signature: dict[str, str],
        constexprs: dict[str, Any],
        backend: str | None = None,
        aligned: bool = False,
        **options,
    ) -> dict[str, Resources]:
        multiples = [name for name, kind in signature.items() if aligned and not kind.startswith("fp")]
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples}
        types = {**signature, **dict.fromkeys(constexprs, "constexpr")}
        source = ASTSource(kernel, types, constexprs, attributes)
        found = {}
        for target in (target for target in targets if backend in (None, target.backend)):
            name = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
            found[name] = resources(triton.compile(source, target=target, options=options), target)
        return found

    return compile_all
