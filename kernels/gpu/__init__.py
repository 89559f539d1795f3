"""Triton kernels of the operators, one file each. A file is imported when a CUDA tensor first needs it.

Matrix products have the accuracy of float32. Each one is computed as three TF32 products, or in float32 on AMD, where
Triton has no TF32. PyTorch's TF32 settings do not change this.
"""

from __future__ import annotations

import importlib.util
import warnings
from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor

MATMUL_PRECISION = "ieee" if torch.version.hip else "tf32x3"


@cache
def available() -> bool:
    """Returns whether Triton can build kernels here. If not, CUDA tensors run the PyTorch reference.

    Triton has no macOS build, and it needs a C compiler. The first call builds one kernel, and warns if that fails.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from tadperf.kernels.gpu import trial

        trial.build()
    except Exception as error:  # a compiler, a driver or a missing file may raise any error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"Triton cannot build kernels, so CUDA tensors run plain PyTorch: {reason}", stacklevel=2)
        return False
    return True


def on_device(x: Tensor) -> AbstractContextManager:
    """Returns a context manager that makes the device of x current. Triton launches kernels on the current device."""
    return torch.cuda.device_of(x)
