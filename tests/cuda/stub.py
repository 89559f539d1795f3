"""Builds and loads fakecuda.cpp, with which a PyTorch without a GPU holds tensors on cuda:0.

Load it before torch is imported. The build takes about 6 s and is kept in build/twin, one library for each PyTorch.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("fakecuda.cpp")
CACHE = Path(__file__).parents[2] / "build" / "twin"


class UnavailableError(RuntimeError):
    """The stub cannot be built here; the message says why."""


def build() -> Path:
    """Returns the library, which it compiles if there is none for this PyTorch. Raises UnavailableError."""
    torch = _torch_folder()
    version = (torch / "version.py").read_bytes()
    library = CACHE / hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:16] / "libfakecuda.so"
    if library.exists():
        return library
    compiler = next((found for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise UnavailableError("the stub of CUDA needs a C++ compiler; found neither g++ nor c++ nor clang++")
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")
    include, lib = torch / "include", torch / "lib"
    command = [compiler, "-O0", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(partial)]
    command += [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    command += [f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UnavailableError(f"the stub of CUDA does not compile with this PyTorch: {result.stderr[-2000:]}")
    partial.replace(library)  # several test processes may build it at once
    return library


def load() -> None:
    """Loads the library and then torch. Raises UnavailableError, or RuntimeError if torch was imported before."""
    if "torch" in sys.modules:
        raise RuntimeError("load the stub before torch is imported")
    library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401

    library.install_guard()


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")  # does not import it
    if not sys.platform.startswith("linux") or spec is None or spec.origin is None:
        raise UnavailableError("the stub of CUDA works with PyTorch on Linux only")
    return Path(spec.origin).parent
