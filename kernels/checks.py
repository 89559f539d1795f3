"""Tensor checks that all operators use. Each raises ValueError with the argument, its value and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

STRIDED = torch.strided  # each look-up in a module takes 0.03 us


def describe(x: Tensor) -> str:
    """Returns type, shape and device in one line."""
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"


def check_dense(**tensors: Tensor | None) -> None:
    """Raises ValueError unless each argument is a dense tensor or None."""
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: {type(x).__name__}: expected a torch.Tensor")
        if x.layout is not STRIDED or x.is_nested:
            kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
            raise ValueError(
                f"{name}: {kind}: expected a dense tensor; convert it with to_dense() or to_padded_tensor()"
            )


def check_like(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless x has this shape, type and device."""
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device:
        raise ValueError(f"{name}: {describe(x)}: expected {dtype} {tuple(shape)} on {device}")


def check_memory(**tensors: Tensor | None) -> None:
    """Raises ValueError if a tensor reaches beyond its storage, for example because FSDP has freed it.

    Compiled code must call this for every tensor of a caller before it reads the tensor.
    """
    for name, x in tensors.items():
        if x is None or (end := x.nbytes) == 0:
            continue
        if x.storage_offset() != 0 or not x.is_contiguous():
            end = _end_in_storage(x)
        available = x.untyped_storage().nbytes()
        if end > available or x.data_ptr() == 0:
            raise ValueError(
                f"{name}: {describe(x)}: its storage has only {available} bytes; "
                "it was freed or resized, restore it first"
            )


def _end_in_storage(x: Tensor) -> int:
    """Returns the bytes of the storage up to the last element of x, which is not empty."""
    span = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return int(x.storage_offset() + span) * x.element_size()
