"""Shows what the twin refuses, what it counts, and what its CUDA graphs do. Prints JSON for test_twin.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from counters import counters

ON_CPU = torch.arange(4.0)
ON_DEVICE = ON_CPU.to("cuda")
MASK = ON_DEVICE > 1
PINNED = ON_CPU.pin_memory()


def add_in_place() -> None:
    ON_DEVICE.add_(0)


REFUSED: dict[str, Callable[[], Any]] = {
    "a CPU tensor beside a CUDA tensor": lambda: ON_DEVICE + ON_CPU,
    "a CPU tensor indexed by a CUDA tensor": lambda: ON_CPU[MASK],
    "CPU values written into a CUDA tensor": lambda: ON_DEVICE.index_put((MASK.nonzero()[:, 0],), ON_CPU[2:]),
    "a CPU scalar in an operator that takes none": lambda: torch.stack([ON_DEVICE[0], torch.tensor(1.0)]),
    "a CPU scalar written from CUDA": lambda: torch.tensor(1.0).add_(ON_DEVICE[0]),
    "numpy": lambda: ON_DEVICE.numpy(),
}
# Legal, but not while a graph is recorded.
REFUSED_IN_A_GRAPH: dict[str, Callable[[], Any]] = {
    "item": lambda: ON_DEVICE[0].item(),
    "nonzero": lambda: MASK.nonzero(),
    "a mask": lambda: ON_DEVICE[MASK],
    "a CPU index": lambda: ON_DEVICE[torch.tensor([0, 1])],
    "a copy to the host": lambda: ON_DEVICE.cpu(),
    "a copy of pageable memory": lambda: ON_CPU.to("cuda", non_blocking=True),
    "synchronize": lambda: torch.cuda.synchronize(),
}
# Operation and the counts that it adds.
COUNTED: dict[str, Callable[[], Any]] = {
    "a kernel": add_in_place,
    "a view": lambda: ON_DEVICE[1:].view(3, 1),
    "a scalar of the CPU": lambda: ON_DEVICE * torch.tensor(2.0),
    "a value written at a mask": lambda: ON_DEVICE.__setitem__(ON_DEVICE > 9, 0.0),
    "a blocking copy": lambda: ON_CPU.to("cuda"),
    "a copy of pinned memory": lambda: PINNED.to("cuda", non_blocking=True),
    "a read": lambda: float(ON_DEVICE[0]),
    "a forward and a backward pass": lambda: (ON_DEVICE.detach().requires_grad_() * 2).sum().backward(),
}


def refused(call: Callable[[], Any]) -> str:
    """Returns the first line of the error, or "" if there is none."""
    try:
        call()
    except (RuntimeError, TypeError) as error:
        return str(error).splitlines()[0]
    return ""


def refused_in_a_graph(call: Callable[[], Any]) -> tuple[str, str]:
    def record() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()

    return refused(call), refused(record)


def counted(call: Callable[[], Any]) -> dict[str, int]:
    counters.reset()
    call()
    return dict(counters.counts)


def unordered(wait: bool = True, join: bool = True, record: bool = True) -> list[str]:
    """One stream makes a tensor, and another one reads it. Returns the problems without some of the waits.

    wait: the reader waits for the maker. join: the maker waits for the reader before the memory is freed. record: the
    memory is not used again before the reader is done.
    """
    before = len(counters.problems)
    maker, reader = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(maker):
        x = torch.ones(2, device="cuda")
    if wait:
        reader.wait_stream(maker)
    with torch.cuda.stream(reader):
        x.sum()
        if record:
            x.record_stream(reader)
    if join:
        maker.wait_stream(reader)
    del x
    return found_since(before)


def unordered_graphs(same_pool: bool, same_stream: bool) -> list[str]:
    """Replays two graphs on two streams. Returns the problems."""
    before, total = len(counters.problems), torch.zeros(2, device="cuda")
    graphs, recorder, pool = [torch.cuda.CUDAGraph() for _ in range(2)], torch.cuda.Stream(), None
    for graph in graphs:
        with torch.cuda.graph(graph, pool=pool, stream=recorder if same_stream else torch.cuda.Stream()):
            torch.add(torch.ones(2, device="cuda"), total)
        pool = graph.pool() if same_pool else None
    for graph in graphs:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.replay()
    return found_since(before)


def found_since(before: int) -> list[str]:
    return [problem.split(",")[0] for problem in counters.problems[before:]]


def graph_values() -> list[list[float]]:
    """Returns a tensor before and after the recording of a graph, and after each of two replays with new inputs."""
    x, total = torch.zeros(2, device="cuda"), torch.zeros(2, device="cuda")
    seen = [total.tolist()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.add_(x * 2 + torch.ones(2, device="cuda"))
    seen.append(total.tolist())
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        seen.append(total.tolist())
    return seen


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "refused": {name: refused(call) for name, call in REFUSED.items()},
                "in a graph": {name: refused_in_a_graph(call) for name, call in REFUSED_IN_A_GRAPH.items()},
                "counted": {name: counted(call) for name, call in COUNTED.items()},
                "graph": graph_values(),
                "streams": {
                    "ordered": unordered(),
                    "no wait": unordered(wait=False),
                    "freed": unordered(join=False, record=False),
                    "freed and recorded": unordered(join=False),
                },
                "graphs": {
                    "apart": unordered_graphs(False, False),
                    "one pool": unordered_graphs(True, False),
                    "one stream": unordered_graphs(False, True),
                },
            }
        )
    )
