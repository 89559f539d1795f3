"""Replaces the functions of torch.cuda that tadperf uses by those of the twin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from graphs import Graph, record, refuse_while_recording
from stream_order import DEFAULT, Event, Stream, record_stream, use_stream, wait_on_host
from torch import Tensor

NAME = "NVIDIA H100 80GB HBM3"


class Properties:
    """The device properties of an H100."""

    name, major, minor, multi_processor_count, warp_size = NAME, 9, 0, 132, 32
    L2_cache_size, total_memory, max_threads_per_multi_processor = 50 << 20, 80 << 30, 2048


def _synchronize(*_: Any) -> None:
    wait_on_host("synchronize")
    refuse_while_recording("synchronize waits for the device")


def replace_torch_cuda() -> None:
    """Makes torch.cuda describe one H100 whose streams, events and graphs are the twin's."""
    functions: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_capability": (9, 0),
        "get_device_properties": Properties(),
        "mem_get_info": (70 << 30, 80 << 30),
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "default_stream": DEFAULT,
        "device": contextlib.nullcontext(),
        "device_of": contextlib.nullcontext(),
    }
    for name in ("_lazy_init", "init", "set_device", "empty_cache", "reset_peak_memory_stats"):
        functions[name] = None
    replaced = {name: _constant(value) for name, value in functions.items()} | {
        "synchronize": _synchronize,
        "is_current_stream_capturing": lambda: Graph.recording is not None,
        "current_stream": lambda *_: Stream.current,
        "stream": use_stream,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": record,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def replace_tensor_functions() -> None:
    """torch.tensor(..., device="cuda") would make memory on a real device; here it copies a CPU tensor."""
    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")):
        setattr(owner, name, _made_on_cpu(getattr(owner, name), owner is Tensor))
    Tensor.record_stream = record_stream  # pyright: ignore[reportAttributeAccessIssue]


def _made_on_cpu(make: Callable[..., Tensor], method: bool) -> Callable[..., Tensor]:
    def made(*args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        if method and args[0].is_cuda:
            device, args = device or args[0].device, (torch.empty(0, dtype=args[0].dtype), *args[1:])
        elif not method and isinstance(args[0], Tensor) and device is None:
            device = args[0].device
        data = make(*args, **kwargs)
        data = data if device is None else data.to(device)
        return data.requires_grad_() if requires_grad else data

    return made
