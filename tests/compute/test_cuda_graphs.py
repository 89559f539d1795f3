"""CUDA graphs of steps, with a fake torch.cuda. Checks the current device and stream, and what is replayed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tadperf.compute import streams
from tadperf.compute.cuda_graphs import GraphedStep


class OnDevice(Tensor):
    """A CPU tensor that claims to be on cuda:1."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("cuda", 1)


class FakeCuda:
    """Replaces torch.cuda: knows the current device and stream, and records the steps of a graph."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device_index, self.current, self.fails = 0, "default", False
        self.launched: list[tuple[str, int]] = []
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream(self.current))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.device_index)
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(streams, "_free", {})
        monkeypatch.setattr(streams, "_handles", {})
        self.handles, self.captures = itertools.cycle(range(1, 33)), []
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.device_index = self.device_index, device.index
        yield
        self.device_index = before

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def new_stream(self, device: torch.device) -> FakeStream:
        """Like torch.cuda.Stream: 32 streams in turn."""
        return FakeStream("side", next(self.handles))

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any, stream: FakeStream) -> Iterator[None]:
        """Like torch.cuda.graph: if recording fails, the stream of the recording stays current."""
        self.captures.append((stream.cuda_stream, pool))
        before, self.current = self.current, "capture"
        yield
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.current = before


class FakeStream:
    def __init__(self, name: str, handle: int = 0) -> None:
        self.name, self.cuda_stream = name, handle

    def wait_stream(self, _: FakeStream) -> None:
        pass


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def pool(self) -> str:
        return f"memory of {id(self)}"

    def replay(self) -> None:
        self.cuda.launched.append(("replay", self.cuda.device_index))


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def tensor(value: float, size: int = 2) -> Tensor:
    return torch.full((size,), value).as_subclass(OnDevice)


def test_a_step_on_another_device_warms_up_records_and_replays_there(cuda):
    step = GraphedStep(lambda *values: cuda.launched.append((cuda.current, cuda.device_index)))
    for value in range(3):
        step(tensor(value), 0.1)
    assert cuda.launched == [("side", 1), ("capture", 1), ("replay", 1), ("replay", 1)]
    assert (cuda.device_index, cuda.current) == (0, "default")


def test_each_shape_and_each_constant_has_its_own_graph(cuda):
    step = GraphedStep(lambda *values: cuda.launched.append((cuda.current, cuda.device_index)))
    for size, constant in ((2, 0.1), (3, 0.1), (2, 0.2), (2, 0.1), (2, 0.1)):
        step(tensor(0, size), constant)
    assert [name for name, _ in cuda.launched] == ["side", "side", "side", "capture", "replay", "replay"]


def test_the_graphs_of_a_step_share_memory_and_a_stream_of_their_own(cuda):
    """A stream has one cuBLAS workspace, and graphs that were recorded on it keep its address."""
    first, second = (GraphedStep(lambda *values: None) for _ in range(2))
    for size in (2, 2, 3, 3):
        first(tensor(0, size))
        second(tensor(0, size))
    (stream, none), (other, also_none), (again, pool), (other_again, other_pool) = cuda.captures
    assert stream == again != other == other_again
    assert none is also_none is None
    assert None is not pool != other_pool is not None


def test_inputs_are_copied_into_the_graph(cuda):
    recorded: list[Tensor] = []
    step = GraphedStep(lambda x: recorded.append(x))
    for value in (1.0, 2.0, 3.0):
        step(tensor(value))
    assert len(recorded) == 2
    assert recorded[1].tolist() == [3.0, 3.0]


def test_the_warm_up_and_the_recording_read_the_same_memory(cuda):
    """Seen on an H100: a row of a tensor is aligned to 8 bytes, its copy to 16; cuDNN chose again and could not."""
    addresses: list[int] = []
    rows = torch.zeros(3, 5)  # a row takes 20 bytes, so the rows differ in alignment
    step = GraphedStep(lambda x: addresses.append(x.data_ptr()))
    for row in rows:
        step(row.as_subclass(OnDevice))
    assert len(addresses) == 2
    assert addresses[0] == addresses[1]
    assert addresses[0] not in {row.data_ptr() for row in rows}


def test_a_failed_recording_leaves_generator_and_allocator_as_they_were(cuda, monkeypatch):
    """Seen on an H100: torch.randn raised an error after a failed recording."""

    class Generator:
        state = "before"

        def clone_state(self) -> str:
            return self.state

        def graphsafe_set_state(self, state: str) -> None:
            self.state = state

    generator, ended = Generator(), []
    monkeypatch.setattr(torch.cuda, "default_generators", (Generator(), generator))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *values: ended.append(values), raising=False)

    def record(x: Tensor) -> None:
        if cuda.current == "capture":
            generator.state = "recording"

    cuda.fails = True
    step = GraphedStep(record)
    step(tensor(1))
    with pytest.warns(RuntimeWarning, match="CUDA graph failed"):
        step(tensor(1))
    assert generator.state == "before"
    assert [device for device, _ in ended] == [1]


def test_inputs_of_another_device_are_copied_to_the_device_of_the_graph(cuda, monkeypatch):
    """Seen on an H100: a graph kept the values of a CPU tensor from its recording, without a word."""
    recorded: list[Tensor] = []
    monkeypatch.setattr(Tensor, "to", lambda self, device: tensor(float(self[0]), len(self)))
    step = GraphedStep(lambda x, y: recorded.append(y))
    for value in (1.0, 2.0, 3.0):
        step(tensor(value), torch.full((2,), value))
    assert recorded[0] is recorded[1]
    assert recorded[1].device == torch.device("cuda", 1)
    assert recorded[1].tolist() == [3.0, 3.0]


def test_a_failed_recording_warns_once_and_restores_the_stream(cuda):
    cuda.fails = True
    streams: list[str] = []
    step = GraphedStep(lambda x: streams.append(cuda.current))
    step(tensor(1))
    with pytest.warns(RuntimeWarning, match="CUDA graph failed, steps run one by one: operation not permitted"):
        step(tensor(1))
    step(tensor(1))
    assert streams == ["side", "capture", "default", "default"]
    assert (cuda.device_index, cuda.current) == (0, "default")


def test_a_stream_has_one_user_at_a_time(cuda):
    """After 32 streams PyTorch hands out the first one again."""

    class User:
        pass

    device, users = torch.device("cuda", 0), [User() for _ in range(32)]
    handles = [streams.own_stream(user, device).cuda_stream for user in users]
    assert len(set(handles)) == 32
    with pytest.raises(RuntimeError, match="all 32 streams of cuda:0 are in use"):
        streams.own_stream(cuda, device)
    del users[7]
    assert streams.own_stream(cuda, device).cuda_stream == handles[7]
