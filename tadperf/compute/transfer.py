"""Copies between the CPU and a CUDA device for which the CPU does not wait."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

T = TypeVar("T")

ALIGNMENT = 16  # bytes; the largest vector load of a CUDA kernel


class PackedCopies:
    """Copies tensors of the same shapes and types to fixed memory on a device, again and again (tadperf).

    On CUDA the tensors travel in one copy from pinned memory, and the CPU does not wait for it. So a CUDA graph can
    read the memory, and a copy changes what its next replay reads. Elsewhere there is one copy for each tensor.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """tensors: on the CPU. Copies them for the first time."""
        self._packs = device.type == "cuda"
        sizes = [_aligned_size(tensor) for tensor in tensors]
        if self._packs:
            memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
            self._memory, self.tensors = memory, _split(memory, sizes, tensors)
        else:
            self.tensors = [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in tensors]
        self._sizes = sizes
        self.copy(tensors)

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Copies new values of all tensors into the fixed memory."""
        if not self._packs:
            for memory, tensor in zip(self.tensors, tensors, strict=True):
                memory.copy_(tensor)
            return
        # A new block each time: PyTorch gives its memory to another one only after the copy is done.
        staging = torch.empty(self._memory.shape, dtype=torch.uint8, pin_memory=True)
        for part, tensor in zip(_split(staging, self._sizes, tensors), tensors, strict=True):
            part.copy_(tensor)
        self._memory.copy_(staging, non_blocking=True)


def upload_all(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Returns CPU tensors on a device. To CUDA they travel in one copy from pinned memory, without a wait.

    Tensors that are on the device already are returned as they are.
    """
    if all(tensor.device == device for tensor in tensors):
        return list(tensors)
    if any(not tensor.is_cpu for tensor in tensors):
        return [tensor.to(device) for tensor in tensors]
    return PackedCopies(tensors, device).tensors


def upload(values: T, device: torch.device) -> T:
    """Returns a NamedTuple or another structure of CPU tensors on a device, as `upload_all` does; the rest is kept."""
    leaves, structure = tree_flatten(values)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if all(tensor.device == device for tensor in tensors):
        return values
    moved = iter(upload_all(tensors, device))
    return tree_unflatten([next(moved) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


class Download:
    """Copies a tensor to the CPU. `read` waits for this copy alone, not for what was launched after it (tadperf)."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values.detach(), None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.current_stream(values.device).record_event()

    def read(self) -> Tensor:
        """Returns the values on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


def _aligned_size(tensor: Tensor) -> int:
    return math.ceil(tensor.numel() * tensor.element_size() / ALIGNMENT) * ALIGNMENT


def _split(memory: Tensor, sizes: list[int], like: Sequence[Tensor]) -> list[Tensor]:
    """Returns views of the memory (uint8), one with the shape and type of each tensor."""
    parts = zip(memory.split(sizes), like, strict=True)
    return [part[: x.numel() * x.element_size()].view(x.dtype).view(x.shape) for part, x in parts]
