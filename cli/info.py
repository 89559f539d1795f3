"""`tadperf info`: prints the installed versions, the devices, and which code each operator runs, or has run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

RunFolder = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Argument(metavar="RUN", help="The folder of a run: also print which code its stages have run."),
]


@command("run --json --debug")
def info(options: SharedOptions, run: RunFolder = None) -> None:
    """Print versions, devices and the code that each operator runs. The code is native, Triton or reference."""
    facts = gather()
    if run is not None:
        facts["stages"] = operators_by_stage(run)
    if options.as_json:
        common.print_json(facts)
    else:
        from tadperf.cli.tables import print_info

        print_info(facts)


def operators_by_stage(run: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Returns {stage: {operator: {implementation: calls}}}. Raises UserError if `run` is not the folder of a run."""
    import json

    from tadperf.errors import UserError

    try:
        stages = json.loads((run / "stages.json").read_bytes())
        return {name: stage.get("kernels", {}) for name, stage in stages.items()}
    except OSError as error:
        raise UserError("RUN", run, f"stages.json: {error.strerror}; give the folder of a run") from None
    except (ValueError, AttributeError):
        raise UserError("RUN", run, "stages.json is damaged") from None


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
