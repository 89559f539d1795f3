"""CUDA graphs of the twin: what is recorded, and its replay operator by operator."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import costs
import torch
from counters import LAUNCH, RECORD, REPLAY, RecordedGraph, counters, line_of_tadperf
from stream_order import Memory, Stream, _merge, clocks, host, replayed, use_stream
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from trees import tensors_of


class Node(NamedTuple):
    """One recorded call, the tensors that it made, and their places among those of its result."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[Tensor]
    places: list[int]


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
        self.reads: dict[int, Any] = {}  # other memory, by its address
        self.writes: dict[int, Any] = {}
        self.memory = Memory()  # of all graphs of one pool
        self.workspace = Memory()
        self.finished = False
        self.costs = costs.Costs()

    def keep(self, tensors: list[Tensor]) -> None:
        """Keeps the values of memory that the next operator overwrites."""
        for tensor in tensors:
            address = _address(tensor)
            if address not in self.own and address not in self.before:
                memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[address] = memory, memory.clone()

    def access(self, reads: list[Tensor], writes: list[Tensor]) -> None:
        """Notes what a recorded operator will use."""
        for tensors, noted in ((reads, self.reads), (writes, self.writes)):
            noted.update({_address(tensor): tensor for tensor in tensors if _address(tensor) not in self.own})

    def add(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Adds a call that was just carried out."""
        inputs, results = ({_address(tensor) for tensor in _dense((args, kwargs))}, _dense(result))
        places = [place for place, tensor in enumerate(results) if _address(tensor) not in inputs]
        made = [results[place] for place in places]
        self.own |= {_address(tensor) for tensor in made}
        self.nodes.append(Node(function, args, kwargs, made, places))

    def replay(self) -> None:
        assert self.finished, "a graph is replayed before it is recorded"
        counters.add(REPLAY, "graph")
        costs.total.add(self.costs)
        replayed(self.reads.values(), [*self.writes.values(), self.memory, self.workspace])
        with _disable_current_modes(), torch.no_grad():
            for node in self.nodes:
                result = node.function(*node.args, **node.kwargs)
                if node.made:
                    results = _dense(result)
                    for old, place in zip(node.made, node.places, strict=True):
                        old.copy_(results[place])

    def pool(self) -> Memory:
        return self.memory

    def reset(self) -> None:
        self.nodes.clear()


workspaces: defaultdict[int, Memory] = defaultdict(Memory)  # of cuBLAS, one for each stream of a recording


@contextlib.contextmanager
def record(graph: Graph, pool: Memory | None = None, stream: Stream | None = None) -> Iterator[None]:
    """Replaces torch.cuda.graph."""
    assert Graph.recording is None
    for known in clocks.values():  # PyTorch waits for the device, once for a recording
        _merge(host, known)
    graph.memory = pool or graph.memory
    graph.workspace = workspaces[stream.cuda_stream if stream else -1]
    Graph.recording, before = graph, counters.lines[LAUNCH].copy()
    try:
        with use_stream(stream):
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


def _dense(tree: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(tree) if tensor.layout is torch.strided]
