"""Chooses how an operator runs: directly in compiled code, through PyTorch's dispatcher, or as its plain reference.

Also counts the calls of each operator by implementation, so that a run can say which code it used.

A direct call saves tens of microseconds. It is correct only for plain tensors, and only if no mode has to see the
operator. So it is not used for fake tensors and subclasses, or under make_fx, torch.jit.trace, profilers and torch.func
transforms.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled, forward_ad
from torch.nn import Parameter
from torch.utils._device import DeviceContext

PLAIN_TYPES = (Tensor, Parameter)
# Functions of PyTorch under short names: without them each call of an operator spends 0.1 us on looking them up.
_is_compiling = torch.compiler.is_compiling
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
IMPLEMENTATIONS = {"cpu": "native", "cuda": "triton", None: "reference"}

# The number of calls of each operator, by the device type whose compiled code ran. Only ever grows.
_calls: dict[str | None, defaultdict[str, int]] = {device: defaultdict(int) for device in IMPLEMENTATIONS}


class Route(Enum):
    """How an operator runs."""

    DIRECT = "compiled code is called directly"
    DISPATCHER = "the operator that is registered with PyTorch"
    REFERENCE = "the plain PyTorch reference"


def record_call(operator: str, device: str | None) -> None:
    """Counts a call of an operator. device: the device type whose compiled code runs; None for the reference.

    Takes 0.1 us. Inside a CUDA graph it counts the recording, not the replays.
    """
    if device is None and _is_compiling():  # a compiler, which sees the reference only, would compile at every count
        return
    _calls[device][operator] += 1


def call_counts() -> Counter[tuple[str, str]]:
    """Returns how often each (operator, implementation) was called in this process. Two results can be subtracted."""
    counts: Counter[tuple[str, str]] = Counter()
    for device, calls in _calls.items():
        known = dict(calls)  # a copy: another thread may add an operator meanwhile
        counts.update({(operator, IMPLEMENTATIONS[device]): count for operator, count in known.items()})
    return counts


def add_call_counts(counts: Mapping[tuple[str, str], int]) -> None:
    """Adds the calls of another process."""
    devices = {implementation: device for device, implementation in IMPLEMENTATIONS.items()}
    for (operator, implementation), count in counts.items():
        _calls[devices[implementation]][operator] += count


def is_direct(*tensors: Tensor | None) -> bool:
    """Returns whether compiled code may be called directly. Used by operators that are not registered with PyTorch."""
    return (
        not _is_compiling()
        and forward_ad._current_level < 0
        and not _transforms_active()
        and _no_mode()
        and _plain(tensors)
    )


def route(operator: str, *tensors: Tensor | None) -> Route:
    """Chooses how `operator` runs on these tensors.

    Returns the reference under torch.func.grad and torch.func.vjp, which can differentiate it. Raises
    NotImplementedError for forward-mode tangents and for torch.vmap.
    """
    if _is_compiling():
        return Route.DISPATCHER
    if forward_ad._current_level >= 0:
        _refuse_tangents(operator, tensors)
    if _transforms_active():
        _refuse_vmap(operator, tensors)
        record_call(operator, None)
        return Route.REFERENCE
    direct = _no_mode() and not _profiler_enabled() and _plain(tensors)
    return Route.DIRECT if direct else Route.DISPATCHER


def _plain(tensors: tuple[Tensor | None, ...]) -> bool:
    for x in tensors:  # noqa: SIM110, a generator takes twice as long
        if x is not None and not (type(x) in PLAIN_TYPES and (x.is_cpu or x.is_cuda)):
            return False
    return True


def _no_mode() -> bool:
    """Returns whether no active mode or tracer has to see the operators."""
    return _dispatch_modes() == 0 and _tracing_state() is None and (_function_modes() == 0 or _only_device_modes())


def _only_device_modes() -> bool:
    """Returns whether all modes come from torch.device or torch.set_default_device, which change no operator."""
    levels = range(_function_modes())
    return all(isinstance(torch._C._get_function_stack_at(level), DeviceContext) for level in levels)


def _refuse_tangents(operator: str, tensors: tuple[Tensor | None, ...]) -> None:
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{operator} has no forward-mode derivative: use {operator}_reference, or remove the tangent"
            )


def _refuse_vmap(operator: str, tensors: tuple[Tensor | None, ...]) -> None:
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    levels = functorch.get_interpreter_stack() or []
    wrapped = any(x is not None and functorch.is_functorch_wrapped_tensor(x) for x in tensors)
    if wrapped and any(level.key() == functorch.TransformType.Vmap for level in levels):
        raise NotImplementedError(f"{operator} does not support torch.vmap: pass the whole batch in one call")
