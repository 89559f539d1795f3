"""CUDA graphs of steps, with a fake torch.cuda. Checks the current device and stream, and what is replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

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
        monkeypatch.setattr(torch.cuda, "Stream", lambda: FakeStream("side"))
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

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        """Like torch.cuda.graph: if recording fails, the stream of the recording stays current."""
        before, self.current = self.current, "capture"
        yield
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.current = before


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, _: FakeStream) -> None:
        pass


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

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


def test_inputs_are_copied_into_the_graph(cuda):
    recorded: list[Tensor] = []
    step = GraphedStep(lambda x: recorded.append(x))
    for value in (1.0, 2.0, 3.0):
        step(tensor(value))
    assert len(recorded) == 2
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
