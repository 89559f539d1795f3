"""Triton kernels of the operators, one file each. A file is imported when a CUDA tensor first needs it."""

from __future__ import annotations

import importlib.util
from functools import cache


@cache
def available() -> bool:
    """Whether Triton is installed (it has no macOS build). Without it CUDA tensors run the PyTorch reference."""
    return importlib.util.find_spec("triton") is not None
