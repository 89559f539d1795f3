"""The first result of a TensorRT engine is compared with PyTorch's, once for each shape and state of the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tadperf.compute.engine_check import LIMIT, checked, relative_error, weight_versions


class Counted(nn.Module):
    """A linear layer that records the number of rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.rows = nn.Linear(3, 2), []

    def forward(self, x: Tensor, time: float) -> dict[str, Tensor]:
        self.rows.append(len(x))
        return {"sample": self.linear(x) * time}


def test_a_right_engine_is_compared_once_for_each_shape_and_after_each_change_of_weights():
    net = Counted()
    eager, engine, calls = copy.copy(net), copy.copy(net), []

    def run(x: Tensor, time: float) -> dict[str, Tensor]:
        calls.append(len(x))
        return {name: (1 + LIMIT / 2) * value for name, value in engine.forward(x, time).items()}

    eager.rows = []
    call = checked(run, eager)
    for rows in (3, 3, 5, 3, 5):
        result = call(torch.ones(rows, 3), 2.0)
    assert relative_error(result, eager.forward(torch.ones(5, 3), 2.0)) == pytest.approx(LIMIT / 2, rel=1e-5)
    assert (eager.rows[:-1], calls) == ([3, 5], [3, 3, 5, 3, 5])
    with torch.no_grad():
        net.linear.weight.mul_(2)
    call(torch.ones(5, 3), 2.0)
    assert eager.rows[-1] == 5
    assert len(eager.rows) == 4


def test_relative_error():
    x = torch.tensor([3.0, 4.0])
    changed = 2 * x + torch.tensor([0.0, 1.0])  # of length sqrt(117)
    assert relative_error((x, {"a": 2 * x}), (x, {"a": changed})) == pytest.approx(117**-0.5)
    assert relative_error([x.bfloat16()], [x]) == 0
    assert relative_error(x, [x, x]) == float("inf")
    assert relative_error(x, x[:1]) == float("inf")
    assert relative_error(x * float("nan"), x) != relative_error(x, x)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_a_change_of_weights_is_detected():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    inner = copy.copy(net)
    states = [weight_versions(inner)]

    def changed() -> bool:
        states.append(weight_versions(inner))
        return states[-1] != states[-2]

    assert not changed()
    net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
    assert changed()
    with torch.no_grad():
        next(net.parameters()).mul_(2)
    assert changed()
    net.to(torch.float64)
    assert changed()
    assert not changed()
