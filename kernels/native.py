"""The compiled part of the operators: loads it, calls it, and says why it is absent."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from tadperf.kernels import thread_pool as threads_of

# The element types that compiled code reads, on a CPU and in Triton. The C++ side of this table is `kind_of`.
ELEMENT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_num_threads = torch.get_num_threads


@cache
def _load() -> tuple[ModuleType | None, str]:
    """Returns the module, or None and the reason. Raises ValueError if TADPERF_KERNELS has an unknown value."""
    wanted = os.environ.get("TADPERF_KERNELS", "")
    if wanted not in ("", "reference"):
        raise ValueError(f"TADPERF_KERNELS: {wanted}: must be reference, or not set")
    if wanted:
        return None, "switched off by TADPERF_KERNELS=reference"
    try:
        native = importlib.import_module("tadperf.kernels._native")
    except ModuleNotFoundError:
        return None, "not built: the C++ build failed when tadperf was installed; pip install -v shows why"
    except ImportError as error:
        return None, f"not loadable: {error}"
    threads_of.configure(native)
    return native, ""


def module() -> ModuleType | None:
    """Returns the nanobind module, or None if it was not built or TADPERF_KERNELS=reference switches it off."""
    return _load()[0]


def available() -> bool:
    """Returns whether operators run compiled code on CPU tensors."""
    return module() is not None


def reason() -> str:
    """Returns in one line why the compiled part is absent, or an empty string if it is present."""
    return _load()[1]


def thread_pool() -> str:
    """Returns which threads compiled code uses and why: "libgomp of torch (path)", "own pool (why)", or "none"."""
    native = module()
    return "none" if native is None else threads_of.configure(native)


@cache
def isa_index() -> int:
    """Returns the index of the instruction set in use, in the list `module().isas()`; -1 without the compiled part.

    Raises ValueError if TADPERF_ISA names an instruction set that this machine lacks.
    """
    native = module()
    if native is None:
        return -1
    names = native.isas()
    wanted = os.environ.get("TADPERF_ISA", names[-1])
    if wanted not in names:
        raise ValueError(f"TADPERF_ISA: {wanted}: this machine supports {', '.join(names)}")
    return names.index(wanted)


def isa() -> str | None:
    """Returns the instruction set in use: "baseline", "avx2" or "avx512". The default is the best of this machine."""
    native = module()
    return native.isas()[isa_index()] if native is not None else None


def call(operator: str, *arguments: Any, isa: int | None = None, threads: int | None = None) -> Any:
    """Calls a function of the compiled part with tensors and numbers.

    Tensors must be on the CPU. They are passed as DLPack capsules, 0.3 us each. The compiled function checks their
    types and shapes, and makes no copies. isa: index of the instruction set; threads: how many to use. The defaults are
    `isa_index()` and `torch.get_num_threads()`.
    """
    if torch.autograd._profiler_enabled():  # a profiler sees no call of C++ by itself
        with torch.autograd.profiler.record_function(f"tadperf::{operator}"):
            return _call(operator, arguments, isa, threads)
    return _call(operator, arguments, isa, threads)


def _call(operator: str, arguments: Sequence[Any], isa: int | None, threads: int | None) -> Any:
    native = module()
    assert native is not None
    # DLPack does not support lazily negated views (x.conj().imag). A capsule carries no gradient, so results have none.
    return getattr(native, operator)(
        *[
            to_dlpack(value.resolve_neg() if value.is_neg() else value) if isinstance(value, Tensor) else value
            for value in arguments
        ],
        isa_index() if isa is None else isa,
        torch.get_num_threads() if threads is None else threads,
    )


def call_resolved(operator: str, tensors: Sequence[Tensor], *others: Any) -> Any:
    """Calls a function whose first arguments are tensors, as `call` does, if no tensor is lazily negated.

    This matters on small inputs: it takes 0.1 us less for each argument and 0.5 us less for the options.
    """
    function = getattr(_load()[0], operator)
    return function(*map(to_dlpack, tensors), *others, isa_index(), _num_threads())
