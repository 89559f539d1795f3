"""Runs a repeated step as a CUDA graph, with one launch for all of its kernels."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from tadperf.compute.streams import own_stream

StepFunction = Callable[..., None]


class GraphedStep:
    """Wraps an in-place `step(*values)` and replays it as a CUDA graph when shapes and constants repeat (tadperf).

    The first call with new shapes or constants runs the step without a graph on a side stream, as the warm-up that
    recording needs. It reads the fixed copies that the graph will read: cuDNN's choice of an algorithm depends on the
    alignment of the memory, and a new choice is not allowed during recording. The second call records the graph on this
    stream, which no other graphs use (`own_stream`). All graphs of one step share their memory, so two of them never
    run at the same time. If recording fails, there is one warning and all calls run the step without a graph. A replay
    runs on the current stream of `device`, which is that of the first tensor by default. Tensors on other devices are
    copied to it at each call. CUDA only.
    """

    def __init__(self, step: StepFunction, device: torch.device | None = None) -> None:
        self.step, self.device, self.failed = step, device, False
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph | None, list[Any]]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # the memory of the first graph

    def __call__(self, *values: Tensor | Hashable) -> None:
        device = self.device or next(value.device for value in values if isinstance(value, Tensor))
        with torch.cuda.device(device):  # streams and graphs belong to the current device
            self._run(values)

    def _run(self, values: tuple[Tensor | Hashable, ...]) -> None:
        if self.failed:
            return self.step(*values)
        key = tuple(value.shape if isinstance(value, Tensor) else value for value in values)
        if key not in self.graphs:
            copies = fixed_copies(values)
            self.graphs[key] = None, copies
            return self._warm_up(copies)
        graph, copies = self.graphs[key]
        for copy, value in zip(copies, values, strict=True):
            if isinstance(value, Tensor):
                copy.copy_(value)
        try:
            graph = graph or self._record(copies)
        except RuntimeError as error:
            warnings.warn(f"CUDA graph failed, steps run one by one: {error}", RuntimeWarning, stacklevel=2)
            self.failed = True
            return self.step(*values)
        self.graphs[key] = graph, copies
        graph.replay()
        # Memory that the step kept from its warm-up belongs to the side stream, which must not reuse it before this.
        self._side_stream().wait_stream(torch.cuda.current_stream())
        return None

    def _side_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = own_stream(self, torch.device("cuda", torch.cuda.current_device()))
        return self._stream

    def _warm_up(self, copies: list[Any]) -> None:
        stream, caller = self._side_stream(), torch.cuda.current_stream()
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            self.step(*copies)
        caller.wait_stream(stream)

    def _record(self, copies: list[Any]) -> torch.cuda.CUDAGraph:
        graph, caller, end = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), recovery()
        try:
            # The outer block restores the stream if recording fails: torch.cuda.graph leaves its own stream current.
            with torch.cuda.stream(caller), torch.cuda.graph(graph, pool=self._pool, stream=self._side_stream()):
                self.step(*copies)
        except RuntimeError:
            end(graph)
            raise
        self._pool = graph.pool()
        return graph


def fixed_copies(values: tuple[Tensor | Hashable, ...]) -> list[Any]:
    """Returns the values, with tensors copied to fixed memory of the current device.

    A graph would copy a value that lies elsewhere as it was at the recording.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    return [_copy(value, device) if isinstance(value, Tensor) else value for value in values]


def recovery() -> Callable[[torch.cuda.CUDAGraph], None]:
    """Returns a function that ends a failed recording. Call this before the recording (tadperf).

    PyTorch (2.11) leaves the random generator and the allocator in the recording if CUDA cannot end it: then
    torch.randn raises an error ("Offset increment outside graph capture").
    """
    device = torch.cuda.current_device()
    states = [(generator, generator.clone_state()) for generator in torch.cuda.default_generators[device : device + 1]]

    def end(graph: torch.cuda.CUDAGraph) -> None:
        for generator, state in states:
            generator.graphsafe_set_state(state)
        stop = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if stop is not None:
            with contextlib.suppress(RuntimeError):  # the recording may have ended its allocations
                stop(device, graph.pool())

    return end


def _copy(value: Tensor, device: torch.device) -> Tensor:
    return value.clone() if value.device == device else value.to(device)
