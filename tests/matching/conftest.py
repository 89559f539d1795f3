"""Fixture: a small matching problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tadperf.config import MatchConfig, NetConfig
from tadperf.matching.gradient import Step
from tadperf.matching.trajectories import draw_steps
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet

FULL = "color_crop_cutout_flip_scale_rotate"
CLASSES = 4


class Problem(NamedTuple):
    net: FlatNet
    start: Tensor
    target: Tensor
    images: Tensor
    labels: Tensor
    lr: Tensor
    steps: Sequence[Step]


def problem(
    soft: bool = False,
    lr: float = 0.1,
    steps: int = 10,
    size: int = 8,
    channels: int = 3,
    count: int = 8,
    batch: int = 5,
    config: NetConfig | None = None,
    strategy: str = FULL,
) -> Problem:
    """Returns a matching problem in float64. 10 steps of 5 images are more than six shuffled passes over 8 images."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    config = config or NetConfig(depth=2, width=6)
    net = FlatNet(build(config, (channels, size, size), CLASSES, 3).double())
    start = net.flatten()
    target = start + 0.02 * normal(*start.shape)
    labels = normal(count, CLASSES) if soft else torch.arange(count) % CLASSES
    match = MatchConfig(steps=steps, batch=batch)
    drawn = draw_steps(match, count, size, strategy, generator).split()
    return Problem(net, start, target, normal(count, channels, size, size), labels, torch.tensor(lr).double(), drawn)


@pytest.fixture(name="problem")
def _problem() -> Callable[..., Problem]:
    return problem
