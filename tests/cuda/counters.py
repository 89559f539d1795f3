"""Counts what a run would ask of a CUDA device, by the line of tadperf that asked for it."""

from __future__ import annotations

import collections
import sys
from typing import NamedTuple, NoReturn

# What is counted. A blocking copy makes the CPU wait until the device is done with everything before it.
LAUNCH, TO_DEVICE, TO_HOST, ASYNC, WAIT = (
    "launch",
    "blocking copy to device",
    "blocking copy to host",
    "async copy",
    "wait",
)
RECORD, REPLAY = "graph record", "graph replay"


class RecordedGraph(NamedTuple):
    """One recorded CUDA graph: the lines of tadperf that recorded it, and its number of nodes."""

    line: str
    nodes: int


class Counters:
    """The counts of a run, its recorded graphs, and the things that CUDA would refuse."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.lines: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.graphs: list[RecordedGraph] = []
        self.graph_lines: list[dict[str, int]] = []  # the nodes of each graph by line
        self.problems: list[str] = []

    def reset(self) -> None:
        """Forgets all counts and graphs, but not the problems."""
        self.counts.clear()
        self.lines.clear()
        self.graphs.clear()
        self.graph_lines.clear()

    def add(self, kind: str, operator: str, number: int = 1) -> None:
        self.counts[kind] += number
        self.lines[kind][f"{line_of_tadperf()} [{operator}]"] += number

    def fail(self, message: str) -> NoReturn:
        """Notes a problem and raises RuntimeError, as CUDA would. A caller that catches it cannot hide it."""
        self.problems.append(f"{message}, at {line_of_tadperf(4)}")
        raise RuntimeError(self.problems[-1])

    def report(self, top: int = 12) -> str:
        """Returns the counts and, for each kind, the lines that count most."""
        rows = [", ".join(f"{kind} {number}" for kind, number in sorted(self.counts.items()))]
        rows += [f"graph of {graph.nodes} nodes at {graph.line}" for graph in self.graphs]
        for kind in (TO_DEVICE, TO_HOST, WAIT, ASYNC, LAUNCH):
            rows += [f"{kind:24}{number:8}  {line}" for line, number in self.lines[kind].most_common(top)]
        return "\n".join([*rows, *(f"PROBLEM {problem}" for problem in self.problems)])


def line_of_tadperf(depth: int = 3) -> str:
    """Returns the innermost `depth` lines of tadperf on the stack, for example "nets/training.py:213".

    Leaves out tadperf.compute, whose callers say more.
    """
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < depth:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("tadperf.") and not module.startswith("tadperf.compute."):
            line = f"{module.removeprefix('tadperf.').replace('.', '/')}.py:{frame.f_lineno}"
            if line not in found[-1:]:  # a comprehension has its own frame
                found.append(line)
        frame = frame.f_back
    return " < ".join(found) or "outside of tadperf"


counters = Counters()
