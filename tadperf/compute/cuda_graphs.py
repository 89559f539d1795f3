"""A step that is taken again and again, as a CUDA graph: one launch for all of its kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

StepFunction = Callable[..., None]


class GraphedStep:
    """`step(*values)`, which changes other tensors in place, replayed where shapes and constants of a call come again.

    The first call with new ones runs as it is, on a stream of its own, which warms up what a graph needs; the second is
    recorded. A step that cannot be recorded costs one warning and goes on as it is. CUDA only.
    """

    def __init__(self, step: StepFunction) -> None:
        self.step, self.failed = step, False
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor]] | None] = {}

    def __call__(self, *values: Tensor | Hashable) -> None:
        if self.failed:
            return self.step(*values)
        key = tuple(value.shape if isinstance(value, Tensor) else value for value in values)
        if key not in self.graphs:
            self.graphs[key] = None
            return self._apart(values)
        try:
            graph, inputs = self.graphs[key] = self.graphs[key] or self._record(values)
        except RuntimeError as error:
            warnings.warn(f"CUDA graph failed, steps run one by one: {error}", RuntimeWarning, stacklevel=2)
            self.failed = True
            return self.step(*values)
        for own, value in zip(inputs, (v for v in values if isinstance(v, Tensor)), strict=True):
            own.copy_(value)
        graph.replay()
        return None

    def _apart(self, values: tuple[Tensor | Hashable, ...]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(*values)
        torch.cuda.current_stream().wait_stream(stream)

    def _record(self, values: tuple[Tensor | Hashable, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        copies = [value.clone() if isinstance(value, Tensor) else value for value in values]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(*copies)
        return graph, [copy for copy in copies if isinstance(copy, Tensor)]
