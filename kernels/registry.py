"""The list of operators. Each operator registers itself, with its implementation on each device."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from tadperf.kernels import gpu, native


class Operator(NamedTuple):
    """The implementation of an operator on each device. If it is not available, the plain PyTorch reference runs."""

    cpu: Literal["native", "reference"]
    cuda: Literal["triton", "reference"]


_operators: dict[str, Operator] = {}


def register(
    name: str, *, cpu: Literal["native", "reference"] = "native", cuda: Literal["triton", "reference"] = "triton"
) -> None:
    """Adds an operator to the list."""
    _operators[name] = Operator(cpu, cuda)


def implementations() -> dict[str, dict[str, str]]:
    """Returns {operator: {device: implementation}} for float32 tensors, sorted by operator.

    An implementation is "native", "triton" or "reference" (plain PyTorch). For CUDA it is "not available" if PyTorch
    finds no CUDA device.
    """
    return {name: {"cpu": _cpu(operator), "cuda": _cuda(operator)} for name, operator in sorted(_operators.items())}


def _cpu(operator: Operator) -> str:
    return operator.cpu if native.available() else "reference"


def _cuda(operator: Operator) -> str:
    if not torch.cuda.is_available():
        return "not available"
    return operator.cuda if gpu.available() else "reference"
