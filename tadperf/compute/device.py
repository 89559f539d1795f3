"""Turns the name of a device into the device, and a device into its product name."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from tadperf.compute import ranks
from tadperf.errors import UserError

if TYPE_CHECKING:
    import torch


def resolve_device(device: str) -> torch.device:
    """Returns the device for "auto" (CUDA if available, else CPU), "cpu", "cuda" or "cuda:i".

    Each rank on a machine gets its own CUDA device. Raises UserError if the device does not exist.
    """
    import torch

    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdecimal())):
        raise UserError("--device", device, "must be auto, cpu, cuda or cuda:i")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "PyTorch finds no CUDA device"
        raise UserError("--device", device, f"{why}; use --device cpu or auto")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        names = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise UserError("--device", device, f"{_only(count)}; use {names}")
    if ranks.world_size() == 1:
        return torch.device("cuda", int(index or 0))
    check_ranks(device, ranks.world_size(), ranks.local_world_size())
    torch.cuda.set_device(ranks.local_rank())
    return torch.device("cuda", ranks.local_rank())


def check_ranks(device: str, world: int, local: int) -> None:
    """Raises UserError if the ranks cannot have a CUDA device each. world: all ranks. local: those of this machine."""
    import torch

    count = torch.cuda.device_count()
    if ":" in device:
        raise UserError("--device", device, f"is one device for {world} ranks; use cuda or auto")
    if local > count:
        raise UserError("--devices", local, f"{_only(count)}; use --devices {count}")


def _only(count: int) -> str:
    return f"only {count} CUDA device{'s' if count > 1 else ''} found"


def hide_gpus() -> None:
    """Hides all GPUs from this process and its children. Call it before anything asks PyTorch for a GPU.

    If PyTorch sees a GPU, it starts autograd threads for it. Then CPU tasks cannot run in forked processes
    (`workers.can_fork`). It changes the environment, so only the command line calls it, for `--device cpu`.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def describe_device(device: torch.device) -> str:
    """Returns the product name of the device, for example "NVIDIA H200" or the CPU's model name."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
