"""Runs a repeated step as a CUDA graph, with one launch for all of its kernels."""

from __future__ import annotations

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
    recording needs. The second call records the graph on this stream, which no other graphs use (`own_stream`). All
    graphs of one step share their memory, so two of them never run at the same time. If recording fails, there is one
    warning and all calls run the step without a graph. A replay runs on the current stream of `device`, which is that
    of the first tensor by default. Tensors on other devices are copied to it at each call. CUDA only.
    """

    def __init__(self, step: StepFunction, device: torch.device | None = None) -> None:
        self.step, self.device, self.failed = step, device, False
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor]] | None] = {}
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
            self.graphs[key] = None
            return self._warm_up(values)
        try:
            graph, inputs = self.graphs[key] = self.graphs[key] or self._record(values)
        except RuntimeError as error:
            warnings.warn(f"CUDA graph failed, steps run one by one: {error}", RuntimeWarning, stacklevel=2)
            self.failed = True
            return self.step(*values)
        for static, value in zip(inputs, (v for v in values if isinstance(v, Tensor)), strict=True):
            static.copy_(value)
        graph.replay()
        # Memory that the step kept from its warm-up belongs to the side stream, which must not reuse it before this.
        self._side_stream().wait_stream(torch.cuda.current_stream())
        return None

    def _side_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = own_stream(self, torch.device("cuda", torch.cuda.current_device()))
        return self._stream

    def _warm_up(self, values: tuple[Tensor | Hashable, ...]) -> None:
        stream, caller = self._side_stream(), torch.cuda.current_stream()
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            self.step(*values)
        caller.wait_stream(stream)

    def _record(self, values: tuple[Tensor | Hashable, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        # On the device: a graph would copy a value that lies elsewhere as it was at the recording.
        device = torch.device("cuda", torch.cuda.current_device())
        copies = [_copy(value, device) if isinstance(value, Tensor) else value for value in values]
        graph, caller = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # The outer block restores the stream if recording fails: torch.cuda.graph then leaves its own stream current.
        with torch.cuda.stream(caller), torch.cuda.graph(graph, pool=self._pool, stream=self._side_stream()):
            self.step(*copies)
        self._pool = graph.pool()
        return graph, [copy for copy in copies if isinstance(copy, Tensor)]


def _copy(value: Tensor, device: torch.device) -> Tensor:
    return value.clone() if value.device == device else value.to(device)
