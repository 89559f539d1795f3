"""Threads of the compiled loops: those of the OpenMP library that PyTorch uses, or a pool of our own.

With PyTorch's threads, compiled loops and PyTorch's own loops do not compete for the cores: see
kernels/cpu/common/parallel.cpp. TADPERF_THREADS=pool selects our own pool.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

ENTRY = "GOMP_parallel"  # in libgomp, and in LLVM's and Intel's OpenMP libraries


@cache
def configure(module: ModuleType) -> str:
    """Chooses the threads of the native `module`; returns which: "libgomp of torch (path)" or "own pool (why)".

    Raises ValueError for an unknown TADPERF_THREADS.
    """
    wanted = os.environ.get("TADPERF_THREADS", "")
    if wanted not in ("", "pool"):
        raise ValueError(f"TADPERF_THREADS: {wanted}: must be pool or unset")
    found = None if wanted else openmp_of_torch()
    module.set_openmp(found[0] if found else 0)
    if found:
        return f"{found[1].name.split('.')[0].split('-')[0]} of torch ({found[1]})"
    return "own pool (TADPERF_THREADS=pool)" if wanted else f"own pool (torch's libraries have no {ENTRY})"


def openmp_of_torch() -> tuple[int, Path] | None:
    """Returns the address of GOMP_parallel in libtorch_cpu's OpenMP library, and the library's path; None without one.

    Other packages may load an OpenMP library of their own (scikit-learn does). So the search goes through libtorch_cpu
    and the libraries that it links. A library from LD_PRELOAD comes first, as for the dynamic linker.
    """
    preloaded = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    loaded_globally = _entry(None)
    if loaded_globally and loaded_globally[1].name in [Path(name).name for name in preloaded]:
        return loaded_globally
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return _entry(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}")


class _SymbolInfo(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = (
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _entry(library: Path | None) -> tuple[int, Path] | None:
    """Returns the address of GOMP_parallel in a library or those that it links, and the path of the file that has it.

    library: None searches the libraries that the process has loaded globally.
    """
    try:
        function = getattr(ctypes.CDLL(None if library is None else str(library)), ENTRY)
        describe = ctypes.CDLL(None).dladdr
    except (AttributeError, OSError):
        return None
    address, info = ctypes.cast(function, ctypes.c_void_p), _SymbolInfo()
    if not address.value or not describe(address, ctypes.byref(info)) or not info.path:
        return None
    return address.value, Path(os.fsdecode(info.path))
