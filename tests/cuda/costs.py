"""Bytes, operations and launches of what runs on the twin, and the milliseconds that they would take on an H100.

`total` grows with every launch outside of a graph, and with the costs of a graph at each of its replays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry
from trees import tensors_of

# Assumptions about an H100, not measurements.
BYTES_PER_MS = 3.0e9  # of a copy
TF32_PER_MS, BFLOAT16_PER_MS = 0.45 * 400e9, 0.45 * 798e9  # of convolutions and products: 45 % of the peak
NODE_MS = 2.5e-3  # the least time of a kernel in a graph
LAUNCH_MS = 5e-3  # of a kernel outside of a graph: the CPU takes longer than the device
BLOCKING_MS = 0.05  # of a copy or a wait that stops the CPU
GATHERS = ("index", "index_select", "gather", "_unsafe_index")  # read no more than they write


class Costs:
    """Sums over kernels. `ms` is the sum of the time of each kernel by its bytes, its operations or its launch."""

    def __init__(self) -> None:
        self.kernels = 0.0
        self.bytes = 0.0
        self.operations = 0.0
        self.ms = 0.0

    def add(self, other: Costs, factor: float = 1.0) -> None:
        for field, value in vars(other).items():
            setattr(self, field, getattr(self, field) + factor * value)

    def kernel(self, moved: float, operations: float, per_ms: float, in_graph: bool, launches: int = 1) -> None:
        least = launches * (NODE_MS if in_graph else LAUNCH_MS)
        self.kernels += launches
        self.bytes += moved
        self.operations += operations
        self.ms += max(least, moved / BYTES_PER_MS, operations / per_ms)


total = Costs()
counting = False  # counting takes time, so only predict.py switches it on


def operator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, graph: Any) -> None:
    """Adds an operator of PyTorch that was carried out on CPU tensors."""
    formula = flop_registry.get(func.overloadpacket)
    operations = float(formula(*args, **kwargs, out_val=result)) if formula else 0.0
    results = tensors_of(result)
    gathers = func.overloadpacket.__name__ in GATHERS
    moved = 2 * size(results) if gathers else size(tensors_of((args, kwargs))) + size(results)
    narrow = any(tensor.dtype is torch.bfloat16 for tensor in results)
    _of(graph).kernel(moved, operations, BFLOAT16_PER_MS if narrow else TF32_PER_MS, graph is not None)


def launcher(values: Any, results: list[Tensor], launches: int, graph: Any) -> None:
    """Adds a Triton launcher. It reads its arguments once and writes its results once."""
    moved = size(tensors_of(values)) + size(results)
    _of(graph).kernel(moved, 0.0, TF32_PER_MS, graph is not None, launches)


def _of(graph: Any) -> Costs:
    return total if graph is None else graph.costs


def size(tensors: list[Tensor]) -> float:
    """Returns the bytes of the tensors; what an expanded tensor repeats does not count."""
    return sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors if t.layout is torch.strided)
