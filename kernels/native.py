"""The compiled part: where it is, which instruction set it uses, and why it is absent where it is."""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

from tadperf.kernels import thread_pool


@cache
def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("TADPERF_KERNELS") == "reference":
        return None, "switched off by TADPERF_KERNELS=reference"
    try:
        native = importlib.import_module("tadperf.kernels._native")
    except ImportError as error:
        return None, f"not built or not loadable: {error}"
    thread_pool.configure(native)
    return native, ""


def module() -> ModuleType | None:
    """The nanobind module, or None where it was not built or is switched off by TADPERF_KERNELS=reference."""
    return _load()[0]


def available() -> bool:
    """Whether operators run compiled code on CPU tensors."""
    return module() is not None


def reason() -> str:
    """Why the compiled part is absent, in one line; empty where it is present."""
    return _load()[1]


@cache
def isa_index() -> int:
    """Place of the instruction set in use among `module().isas()`; -1 without the compiled part."""
    native = module()
    if native is None:
        return -1
    names = native.isas()
    wanted = os.environ.get("TADPERF_ISA", names[-1])
    if wanted not in names:
        raise ValueError(f"TADPERF_ISA: {wanted}: this machine runs {', '.join(names)}")
    return names.index(wanted)


def isa() -> str | None:
    """Instruction set in use, "baseline", "avx2" or "avx512": the best the machine runs, or TADPERF_ISA's."""
    native = module()
    return native.isas()[isa_index()] if native is not None else None
