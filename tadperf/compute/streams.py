"""CUDA streams: each has one user at a time, and several small networks train side by side on them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tadperf.compute import ranks
from tadperf.compute.torch_settings import torch_settings
from tadperf.compute.workers import run_parallel

T = TypeVar("T")

STREAMS = 4  # networks that train side by side; not tuned
# Activations of a step's widest layer up to which they do: batches of 256 images of 32 x 32 at width 128, which take
# about 0.5 GB for each network. Larger steps fill a GPU alone; not tuned.
SMALL = 1 << 25
POOL = 32  # PyTorch hands out this many different streams in turn, and then the first one again

_free: dict[torch.device, list[torch.cuda.Stream]] = {}  # those without a user
_handles: dict[torch.device, set[int]] = {}  # of all streams that this module ever gave away


def own_stream(user: object, device: torch.device) -> torch.cuda.Stream:
    """Returns a stream of a CUDA device that nobody else gets from this function while `user` lives.

    A graph needs its own stream for its recording. PyTorch keeps one cuBLAS workspace for each stream, and recorded
    kernels keep its address. Two graphs of one stream would write to it at the same time, and the end of one graph
    frees it under the other one (pytorch/pytorch issue 193402).
    Raises RuntimeError if all streams are in use.
    """
    free = _free.setdefault(device, [])
    stream = free.pop() if free else _new_stream(device)
    weakref.finalize(user, free.append, stream)
    return stream


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    handles = _handles.setdefault(device, set())
    for _ in range(POOL):
        stream = torch.cuda.Stream(device)
        if stream.cuda_stream not in handles:
            handles.add(stream.cuda_stream)
            return stream
    raise RuntimeError(f"all {POOL} streams of {device} are in use")


def streams_for(activations: int) -> int:
    """Returns how many networks train side by side if the widest layer of a step has `activations` values."""
    return STREAMS if activations <= SMALL else 1


def run_to_end(task: Generator[object, None, T]) -> T:
    """Runs all parts of a task and returns its result."""

    def parts() -> Generator[object, None, None]:
        nonlocal result
        result = yield from task

    result: Any = None
    for _ in parts():
        pass
    return result


def run_in_parts(
    start: Callable[[Any], Generator[object, None, Any]],
    items: Sequence[Any],
    device: torch.device,
    activations: int,
    finish: Callable[[Any], Any] = lambda result: result,
) -> Iterator[tuple[int, Any]]:
    """Yields (position, finish(result)) of tasks that train networks: on a CPU by `run_parallel`, one for each core.

    On CUDA by `run_side_by_side`, with `streams_for(activations)` streams. start, finish: as there.
    """
    if device.type == "cpu":
        return run_parallel(lambda item: finish(run_to_end(start(item))), items)
    return run_side_by_side(start, items, device, streams_for(activations), finish)


def run_side_by_side(
    start: Callable[[Any], Generator[object, None, T]],
    items: Sequence[Any],
    device: torch.device,
    streams: int,
    finish: Callable[[Any], Any] = lambda result: result,
) -> Iterator[tuple[int, Any]]:
    """Yields (position, finish(result)) of tasks on a CUDA device, `streams` of them at a time (tadperf).

    A small network leaves most of a GPU idle, so the kernels of several should run at once. Each task has its own
    stream. This thread launches the parts of all tasks in turn, so one task must not wait for the device in its parts.
    Memory: that of all tasks that run at a time. The results do not depend on the number of streams.
    start: returns a generator that launches one part of the task of an item before each yield, and returns a result.
    finish: may wait for the device. By then the caller's stream waits for the task.
    Ranks divide the items, as in `run_parallel`.
    """

    def work(positions: Sequence[int]) -> Iterator[tuple[int, Any]]:
        caller, width = torch.cuda.current_stream(device), min(streams, len(positions))
        lanes = [_Lane(caller, None if width == 1 else device) for _ in range(width)]
        waiting = iter(enumerate(positions))

        def next_task(lane: _Lane) -> bool:
            for index, position in islice(waiting, 1):
                lane.begin(index, start(items[position]))
            return lane.task is not None

        try:
            while running := [lane for lane in lanes if lane.task is not None or next_task(lane)]:
                finished = [lane for lane in running if lane.advance()]
                for lane in finished:
                    lane.join()
                for lane in finished:
                    yield lane.index, finish(lane.take_result())
        finally:
            for lane in lanes:
                lane.join()

    return ranks.divide_work(work, len(items))


class _Lane:
    """A stream and the task that it runs."""

    def __init__(self, caller: torch.cuda.Stream, device: torch.device | None) -> None:
        """device: None if the tasks run on the stream of the caller."""
        self.caller, self.stream = caller, caller if device is None else own_stream(self, device)
        self.index, self.task, self.result = -1, None, None

    def begin(self, index: int, task: Generator[object, None, Any]) -> None:
        """Takes a new task. It sees what the caller, and all tasks that have finished, did before."""
        self.index, self.task = index, task
        self.stream.wait_stream(self.caller)

    def advance(self) -> bool:
        """Launches the next part. Returns whether it was the last one."""
        assert self.task is not None
        with torch.cuda.stream(self.stream), torch_settings(threads=1), ranks.working_alone():
            try:
                next(self.task)
            except StopIteration as end:
                self.task, self.result = None, end.value
        return self.task is None

    def join(self) -> None:
        """Makes the caller's stream wait for everything that was launched here, and lets it use the result."""
        self.caller.wait_stream(self.stream)
        for value in tree_leaves(self.result):
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(self.caller)  # else its memory could be used again while the caller reads it

    def take_result(self) -> Any:
        result, self.result = self.result, None
        return result
