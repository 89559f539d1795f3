"""`tadperf info`: prints the installed versions, the devices, and which code each operator runs."""

from __future__ import annotations

from typing import Any

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command


@command("--json --debug")
def info(options: SharedOptions) -> None:
    """Print versions, devices, and which operators run native, Triton or reference code."""
    facts = gather()
    if options.as_json:
        common.print_json(facts)
    else:
        from tadperf.cli.tables import print_info

        print_info(facts)


def gather() -> dict[str, Any]:
    """Returns versions, platform, devices by name, and implementations by operator and device."""
    import os
    import platform

    import torch

    from tadperf.compute.device import describe_device
    from tadperf.compute.versions import versions
    from tadperf.kernels import implementations, native

    devices = {"cpu": describe_device(torch.device("cpu"))}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = describe_device(torch.device("cuda", index))
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
        "operators": implementations(),
        "native": {
            "available": native.available(),
            "isa": native.isa(),
            "reason": native.reason(),
        },
    }
