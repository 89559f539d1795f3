"""Runs a repeated step as a CUDA graph, with one launch for all of its kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

StepFunction = Callable[..., None]


class GraphedStep:
    """Wraps an in-place `step(*values)` and replays it as a CUDA graph when shapes and constants repeat (tadperf).

    The first call with new shapes or constants runs the step without a graph on a side stream, as the warm-up that
    recording needs. The second call records the graph. If recording fails, there is one warning and all calls run the
    step without a graph. Everything runs on `device`, by default that of the first tensor. CUDA only.
    """

    def __init__(self, step: StepFunction, device: torch.device | None = None) -> None:
        self.step, self.device, self.failed = step, device, False
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor]] | None] = {}

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
        return None

    def _warm_up(self, values: tuple[Tensor | Hashable, ...]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(*values)
        torch.cuda.current_stream().wait_stream(stream)

    def _record(self, values: tuple[Tensor | Hashable, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        copies = [value.clone() if isinstance(value, Tensor) else value for value in values]
        graph = torch.cuda.CUDAGraph()
        # The outer block restores the stream if recording fails: torch.cuda.graph then leaves its own stream current.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            self.step(*copies)
        return graph, [copy for copy in copies if isinstance(copy, Tensor)]
