"""Versions of the software that can change a result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def tadperf_version() -> str:
    """Returns the version of the installed tadperf; "0+source" if it is not installed."""
    try:
        return version("tadperf")
    except PackageNotFoundError:
        return "0+source"


def versions() -> dict[str, str]:
    """Returns the versions that can change a result: tadperf, Python, PyTorch (and its CUDA), numpy."""
    import numpy
    import torch

    return {
        "tadperf": tadperf_version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda or ""),
        "numpy": numpy.__version__,
    }
