"""The sweep that a CUDA graph holds: the same gradient as the adjoint's, from the few tensors that it takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tadperf.config import MatchConfig, NetConfig
from tadperf.data import augment
from tadperf.matching import step_backends
from tadperf.matching.cuda_graph_sweep import GraphedSweep, join_steps, split_steps
from tadperf.matching.gradient import Step, adjoint
from tadperf.matching.loop import mean_gradient
from tadperf.matching.state import initial_state
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SIZES = (5, 5, 2, 5)  # a pattern of batches as a set of 12 gives


def problem(strategy: str, soft: bool, seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    net = FlatNet(build(NetConfig.model_validate({"width": 4, "depth": 1}), (3, 8, 8), 3, seed))
    start = net.flatten()
    steps = [
        Step(torch.randperm(12, generator=generator)[:size], augment.draw(strategy, size, 8, generator))
        for size in SIZES
    ]
    images = torch.randn(12, 3, 8, 8, generator=generator)
    labels = torch.randn(12, 3, generator=generator) if soft else torch.arange(12) % 3
    return [
        net,
        start,
        start + 0.1 * torch.randn(start.shape, generator=generator),
        images,
        labels,
        torch.tensor(0.1),
        steps,
    ]


def unrecorded(net: FlatNet) -> GraphedSweep:
    """A sweep as it goes on where no graph can be recorded."""
    sweep = GraphedSweep(net, step_backends.eager(net))
    sweep.replayed.failed = True
    return sweep


@pytest.mark.parametrize("strategy", ["none", "flip", "color_crop_cutout_flip_scale_rotate"])
def test_steps_survive_being_joined(strategy):
    steps = problem(strategy, False, 0)[-1]
    index, affine, color, hole, sizes = join_steps(steps, CPU)
    assert sizes == SIZES
    for step, again in zip(steps, split_steps(index, augment.Draw(affine, color, hole), sizes), strict=True):  # pyright: ignore
        assert torch.equal(step.index, again.index)
        for field, other in zip(step.drawn, again.drawn, strict=True):
            torch.testing.assert_close(field, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("soft", [False, True])
def test_a_sweep_is_the_adjoint(soft):
    sweep = None
    for seed in (0, 1):  # the second into the memory of the first
        net, *arguments = problem("color_crop_cutout_flip_scale_rotate", soft, seed)
        sweep = sweep or unrecorded(net)
        wanted = adjoint(net, *arguments)
        assert wanted.images.norm() > 0
        for got, exact in zip(sweep(*arguments), wanted, strict=True):
            torch.testing.assert_close(got, exact, rtol=0, atol=0)


def test_trajectories_do_not_overwrite_each_other():
    net, _, _, images, labels, _, _ = problem("none", True, 0)

    class Trained:
        def __len__(self) -> int:
            return 3

        def snapshot(self, expert: int, epoch: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(expert)
            return net.flatten() + 0.1 * epoch * torch.randn(net.num_parameters, generator=generator)

    config = MatchConfig.model_validate(
        {"trajectories": 3, "steps": 3, "batch": 5, "max_start": 2, "expert_epochs": 1, "soft_labels": True}
    )
    state, experts = initial_state(images, labels, config), Trained()
    ways_of = (unrecorded(net), partial(adjoint, net))
    found = [mean_gradient(state, way, experts, config, "flip", 0) for way in ways_of]  # pyright: ignore
    for got, exact in zip(found[0][:4], found[1][:4], strict=True):
        assert got is not None
        assert torch.equal(got, exact)  # pyright: ignore


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("soft", [False, True])
def test_replayed_on_a_gpu(soft):
    net, *_ = problem("color_crop_cutout_flip_scale_rotate", soft, 0)
    net = FlatNet(net.module.cuda())
    sweep = GraphedSweep(net, step_backends.autograd(net))
    for seed in (0, 1, 2, 3):
        _, *values, steps = problem("color_crop_cutout_flip_scale_rotate", soft, seed)
        start, target, x, y, lr = (value.cuda() for value in values)
        on_gpu = [step._replace(index=step.index.cuda()) for step in steps]
        wanted = adjoint(net, start, target, x, y, lr, on_gpu, way=step_backends.autograd(net))
        found = sweep(start, target, x, y, lr, on_gpu)
        torch.testing.assert_close(found.images, wanted.images, rtol=1e-4, atol=1e-5)
    assert not sweep.replayed.failed
    assert any(sweep.replayed.graphs.values())
