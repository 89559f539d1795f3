"""The order of streams on the twin: finds memory that two streams use without a wait between them.

Every stream knows how many operations of each other stream are done, and so does the CPU (a vector clock). A wait for a
stream or an event brings this knowledge, and a launch knows what the CPU knows. Problems are noted in `counters`:
- an operation reads what another stream may still write, or writes what another stream may still use;
- memory is freed while another stream may still use it, and the stream that made it does not know. PyTorch may give it
  away again at once. `Tensor.record_stream` prevents that.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from counters import WAIT, counters, line_of_tadperf
from torch import Tensor

Clock = dict[int, int]  # the last operation that is known to be done, for each stream
clocks: defaultdict[int, Clock] = defaultdict(dict)  # of each stream; the number of its own last launch, too
host: Clock = {}
events: list[tuple[Any, ...]] = []  # ("wait", stream, for this one) and ("replay", stream)


class Stream:
    """Replaces torch.cuda.Stream. As in PyTorch, the streams of a program are 32 that come round again and again."""

    made = 0
    current: Stream  # set below, to the default stream

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 1 + Stream.made % 32
        Stream.made += 1

    def synchronize(self) -> None:
        wait_on_host("Stream.synchronize", clocks[self.cuda_stream])

    def wait_stream(self, stream: Stream) -> None:
        events.append(("wait", self.cuda_stream, stream.cuda_stream))
        _merge(clocks[self.cuda_stream], clocks[stream.cuda_stream])

    def wait_event(self, event: Event) -> None:
        _merge(clocks[self.cuda_stream], event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True


class Event:
    """Replaces torch.cuda.Event."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict(clocks[(stream or Stream.current).cuda_stream])

    def wait(self, stream: Stream | None = None) -> None:
        (stream or Stream.current).wait_event(self)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        wait_on_host("Event.synchronize", self.clock)


Stream.current = DEFAULT = Stream()
DEFAULT.cuda_stream, Stream.made = 0, 0


@contextlib.contextmanager
def use_stream(stream: Stream | None) -> Iterator[None]:
    """Replaces torch.cuda.stream."""
    before = Stream.current
    Stream.current = stream or before
    try:
        yield
    finally:
        Stream.current = before


def wait_on_host(name: str, clock: Clock | None = None) -> None:
    """Counts a wait of the CPU. It then knows everything that the clock knows; by default that of every stream."""
    counters.add(WAIT, name)
    for known in clocks.values() if clock is None else [clock]:
        _merge(host, known)


def host_waits_for_current_stream() -> None:
    """Notes the wait of an operation that is counted elsewhere."""
    _merge(host, clocks[Stream.current.cuda_stream])


class Memory:
    """Something that operations use and that is no tensor: the memory of graphs, the workspace of cuBLAS."""


class Uses:
    """The last uses of a piece of memory. It is an attribute of a storage, and so lives as long as that."""

    def __init__(self, owner: int) -> None:
        self.owner = owner  # the stream that made it
        self.write: tuple[int, int] | None = None  # stream and number of the operation
        self.reads: Clock = {}
        self.recorded: set[int] = set()  # the streams of record_stream

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        known = clocks[self.owner]
        for stream, number in [*self.reads.items(), *([self.write] if self.write else [])]:
            late = number > max(known.get(stream, 0), host.get(stream, 0))
            if stream != self.owner and stream not in self.recorded and late:
                _problem(f"stream {self.owner} frees memory that stream {stream} may still use")


def replayed(reads: Iterable[Any], writes: Iterable[Any]) -> None:
    """Notes the replay of a graph."""
    events.append(("replay", Stream.current.cuda_stream))
    accessed(reads, writes)


def owned(tensors: Iterable[Tensor]) -> None:
    """Notes that new tensors belong to the current stream."""
    for memory in _memories(tensors):
        _uses_of(memory)


def accessed(reads: Iterable[Any], writes: Iterable[Any]) -> None:
    """Notes an operation on the current stream and what it reads and writes: tensors of the CPU, or `Memory`."""
    stream = Stream.current.cuda_stream
    clock = clocks[stream]
    _merge(clock, host)
    clock[stream] = number = clock.get(stream, 0) + 1
    written = _memories(writes)
    for memory in _memories(reads):
        if not any(memory is other for other in written):
            uses = _uses_of(memory)
            _check(clock, stream, uses.write, "reads what", "writes")
            uses.reads[stream] = number
    for memory in written:
        uses = _uses_of(memory)
        for use in (uses.write, *uses.reads.items()):
            _check(clock, stream, use, "writes what", "uses")
        uses.write, uses.reads = (stream, number), {}


def record_stream(tensor: Any, stream: Stream) -> None:
    """Replaces Tensor.record_stream."""
    _uses_of(tensor.untyped_storage()).recorded.add(stream.cuda_stream)


def _check(clock: Clock, stream: int, use: tuple[int, int] | None, verb: str, other: str) -> None:
    if use is not None and use[0] != stream and use[1] > clock.get(use[0], 0):
        _problem(f"stream {stream} {verb} stream {use[0]} still {other}")


def _problem(message: str) -> None:
    counters.problems.append(f"{message}, at {line_of_tadperf(4)}")


def _memories(values: Iterable[Any]) -> list[Any]:
    """Returns each piece of memory once. Sparse tensors have none that can be asked for."""
    dense = (value for value in values if not isinstance(value, Tensor) or value.layout is torch.strided)
    found = (value.untyped_storage() if isinstance(value, Tensor) else value for value in dense)
    return list({id(memory): memory for memory in found}.values())


def _uses_of(memory: Any) -> Uses:
    uses = getattr(memory, "uses", None)
    if uses is None:
        memory.uses = uses = Uses(Stream.current.cuda_stream)
    return uses


def _merge(clock: Clock, other: Clock) -> None:
    for stream, number in other.items():
        if number > clock.get(stream, 0):
            clock[stream] = number
