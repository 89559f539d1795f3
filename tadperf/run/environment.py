"""Describes the machine and the software that a run uses."""

from __future__ import annotations

import os
import platform
import sys
import time
from typing import Any

from tadperf.compute.device import describe_device, resolve_device
from tadperf.compute.versions import versions


def describe_environment(device: str) -> dict[str, Any]:
    """Returns versions, platform, CPU, threads, device, operators, arguments and date.

    device: a name as in `resolve_device`. operators: which code each operator can run on a CPU and on CUDA; stages.json
    says which code each stage has run.
    """
    import torch

    from tadperf.kernels import implementations

    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": describe_device(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "device_name": describe_device(resolve_device(device)),
        "operators": implementations(),
        "argv": sys.argv,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
