"""tadperf: fast dataset distillation for data with noisy labels.

    ds = tadperf.load("distilled.safetensors")
    x, y = ds.images, ds.labels
    net = ds.train()
    ds.accuracy(net, test)

Each name is imported when it is first used (PEP 562), so `import tadperf` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tadperf.artifact import DistilledSet, load
    from tadperf.config import Config
    from tadperf.data import Dataset, open_data
    from tadperf.errors import UserError
    from tadperf.pipeline.api import audit, distill

    __version__: str

__all__ = ["Config", "Dataset", "DistilledSet", "UserError", "__version__", "audit", "distill", "load", "open_data"]

_MODULES = {  # where each public name is defined
    "Config": "tadperf.config",
    "Dataset": "tadperf.data",
    "DistilledSet": "tadperf.artifact",
    "UserError": "tadperf.errors",
    "audit": "tadperf.pipeline.api",
    "distill": "tadperf.pipeline.api",
    "load": "tadperf.artifact",
    "open_data": "tadperf.data",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from tadperf.compute.versions import tadperf_version

        return tadperf_version()
    if name not in _MODULES:
        raise AttributeError(f"module 'tadperf' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
