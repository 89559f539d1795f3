"""Which device a run computes on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from tadperf.compute import ranks
from tadperf.errors import UserError

if TYPE_CHECKING:
    import torch


def resolve_device(device: str) -> torch.device:
    """The device named "auto" (CUDA where there is one, else CPU), "cpu", "cuda" or "cuda:i".

    Of several ranks on a machine each has its own CUDA device. Raises UserError where that device is not there.
    """
    import torch

    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdecimal())):
        raise UserError("--device", device, "must be auto, cpu, cuda or cuda:i")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no CUDA device"
        raise UserError("--device", device, f"{why}; use --device cpu or auto")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise UserError("--device", device, f"there are {count} CUDA devices: use cuda:0 to cuda:{count - 1}")
    if ranks.world_size() == 1:
        return torch.device("cuda", int(index or 0))
    if index:
        raise UserError("--device", device, f"is one device for {ranks.world_size()} ranks; use cuda or auto")
    if ranks.local_world_size() > count:
        raise UserError("--devices", ranks.local_world_size(), f"there are {count} CUDA devices; take at most so many")
    torch.cuda.set_device(ranks.local_rank())
    return torch.device("cuda", ranks.local_rank())


def set_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions on CUDA keep 10 bits of mantissa, in this process from now on.

    A run says so, once: PyTorch's own default is yes for convolutions and no for products.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def describe_device(device: torch.device) -> str:
    """The name a person knows the device by, such as "NVIDIA H200" or the CPU's model name."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
