"""CUDA graphs of the twin: what is recorded, and its replay operator by operator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import costs
import torch
from counters import LAUNCH, RECORD, REPLAY, RecordedGraph, counters, line_of_tadperf
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from trees import tensors_of


class Node(NamedTuple):
    """One recorded call, and the tensors that it made."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[Tensor]


class Graph:
    """Replaces torch.cuda.CUDAGraph.

    Recording must change no value. The twin computes while it records, because tadperf may look at shapes. So it keeps
    the memory that a recorded operator writes to, and gives the old values back after the recording.
    """

    recording: Graph | None = None  # the graph that is being recorded

    def __init__(self, *_: Any, **__: Any) -> None:
        self.nodes: list[Node] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.own: set[int] = set()  # memory that the graph itself made
        self.finished = False
        self.costs = costs.Costs()

    def keep(self, tensors: list[Tensor]) -> None:
        """Keeps the values of memory that the next operator overwrites."""
        for tensor in tensors:
            address = _address(tensor)
            if address not in self.own and address not in self.before:
                memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[address] = memory, memory.clone()

    def add(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Adds a call that was just carried out."""
        made = _made(args, kwargs, result)
        self.own |= {_address(tensor) for tensor in made}
        self.nodes.append(Node(function, args, kwargs, made))

    def replay(self) -> None:
        assert self.finished, "a graph is replayed before it is recorded"
        counters.add(REPLAY, "graph")
        costs.total.add(self.costs)
        with _disable_current_modes(), torch.no_grad():
            for node in self.nodes:
                result = node.function(*node.args, **node.kwargs)
                for old, new in zip(node.made, _made(node.args, node.kwargs, result), strict=True):
                    old.copy_(new)

    def pool(self) -> tuple[int, int]:
        return 0, 0

    def reset(self) -> None:
        self.nodes.clear()


@contextlib.contextmanager
def record(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """Replaces torch.cuda.graph."""
    assert Graph.recording is None
    Graph.recording, before = graph, counters.lines[LAUNCH].copy()
    try:
        yield
    finally:
        Graph.recording = None
        for memory, values in graph.before.values():
            memory.copy_(values)
    graph.finished = True
    nodes = counters.lines[LAUNCH] - before
    counters.graphs.append(RecordedGraph(line_of_tadperf(6), sum(nodes.values())))
    counters.graph_lines.append(dict(nodes))
    counters.add(RECORD, "graph")


def refuse_while_recording(message: str) -> None:
    """Raises the error that CUDA raises for something that no graph can hold."""
    if Graph.recording is not None:
        counters.fail(f"{message} while a CUDA graph is recorded")


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _made(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> list[Tensor]:
    """Returns the tensors of a result that do not share memory with an argument."""
    inputs = {_address(tensor) for tensor in tensors_of((args, kwargs)) if tensor.layout is torch.strided}
    results = [tensor for tensor in tensors_of(result) if tensor.layout is torch.strided]
    return [tensor for tensor in results if _address(tensor) not in inputs]
