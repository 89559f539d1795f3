"""GraphedSweep returns the gradient of the adjoint. Without a GPU it runs without a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tadperf.compute.torch_settings import torch_settings
from tadperf.config import MatchConfig, NetConfig
from tadperf.data import augment
from tadperf.kernels import trajectory_distance
from tadperf.matching import gradient, step_backends, trajectories
from tadperf.matching.base import MatchProblem
from tadperf.matching.cuda_graph_sweep import GraphedSweep
from tadperf.matching.gradient import Gradient, Step, StepDraws, adjoint
from tadperf.matching.loop import mean_gradient
from tadperf.matching.state import MatchState, initial_state
from tadperf.matching.trajectories import TrajectoryMatching
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SIZES = (5, 5, 2, 5)  # batch sizes


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


def sweep_without_graph(net: FlatNet, scaled: bool = True) -> GraphedSweep:
    """Returns a sweep that runs without a graph, because a CPU cannot record one."""
    sweep: Any = GraphedSweep(net, step_backends.eager(net), scaled=scaled)
    sweep.graphed_step = sweep._write_gradient
    return sweep


@pytest.mark.parametrize("strategy", ["none", "flip", "color_crop_cutout_flip_scale_rotate"])
def test_split_inverts_join(strategy):
    steps = problem(strategy, False, 0)[-1]
    joined = StepDraws.join(steps).to(CPU)
    assert joined.sizes == SIZES
    for step, again in zip(steps, joined.split(), strict=True):
        assert torch.equal(step.rows, again.rows)
        assert isinstance(step.drawn, augment.Draw)
        assert isinstance(again.drawn, augment.Draw)
        for field, other in zip(step.drawn, again.drawn, strict=True):
            torch.testing.assert_close(field, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("soft", [False, True])
def test_the_sweep_equals_the_adjoint(soft):
    sweep = None
    for seed in (0, 1):  # the second one writes into the memory of the first
        net, *arguments = problem("color_crop_cutout_flip_scale_rotate", soft, seed)
        sweep = sweep or sweep_without_graph(net)
        expected = adjoint(net, *arguments)
        assert expected.images.norm() > 0
        start, target, images, labels, lr, steps = arguments
        found = sweep(start, target, images, labels, lr, StepDraws.join(steps))
        for actual, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, exact, rtol=0, atol=0)


def three_trajectories() -> tuple[FlatNet, MatchState, MatchProblem]:
    net, _, _, images, labels, _, _ = problem("none", True, 0)

    class FakeExperts:
        def __len__(self) -> int:
            return 3

        def snapshot(self, expert: int, epoch: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(expert)
            return net.flatten() + 0.1 * epoch * torch.randn(net.num_parameters, generator=generator)

    config = MatchConfig.model_validate(
        {"trajectories": 3, "steps": 3, "batch": 5, "max_start": 2, "expert_epochs": 1, "soft_labels": True}
    )
    experts: Any = FakeExperts()
    return net, initial_state(images, labels, config), MatchProblem(net, experts, config, "flip", 0)


def mean_of(compute: Any, state: MatchState, match: MatchProblem) -> Gradient:
    base = TrajectoryMatching(state, match)
    base.compute = compute
    return mean_gradient(state, base, match.config.trajectories)


def test_trajectories_do_not_overwrite_each_other():
    net, state, match = three_trajectories()

    def by_step(*values: Any) -> Gradient:
        start, target, x, y, lr, drawn = values
        return adjoint(net, start, target, x, y, lr, drawn.split())

    sweep, exact = (mean_of(compute, state, match) for compute in (sweep_without_graph(net), by_step))
    for name in ("loss", "images", "labels", "lr", "layers"):
        assert torch.equal(getattr(sweep, name), getattr(exact, name))


def test_joined_trajectories_take_one_call_of_the_distance(monkeypatch):
    net, state, match = three_trajectories()
    expected = mean_of(sweep_without_graph(net), state, match)
    rows: list[int] = []

    def counted(student: torch.Tensor, *others: Any) -> Any:
        rows.append(len(student))
        return trajectory_distance(student, *others)

    monkeypatch.setattr(gradient, "trajectory_distance", counted)
    monkeypatch.setattr(trajectories, "joins_trajectories", lambda *_: True)
    found = mean_of(sweep_without_graph(net, scaled=False), state, match)
    assert rows == [3]
    for name in ("loss", "images", "labels", "lr", "layers", "end"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-8)


def test_several_trajectories_of_a_rank_are_joined_on_cuda_only():
    config = MatchConfig(trajectories=2)
    assert trajectories.joins_trajectories(config, torch.device("cuda"))
    assert not trajectories.joins_trajectories(config, CPU)
    assert not trajectories.joins_trajectories(MatchConfig(), torch.device("cuda"))
    assert not trajectories.joins_trajectories(MatchConfig(trajectories=2, gradient="unroll"), torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("soft", [False, True])
@torch_settings(tf32=False)
def test_the_graph_on_a_gpu_equals_the_adjoint(soft):
    net, *_ = problem("color_crop_cutout_flip_scale_rotate", soft, 0)
    net = FlatNet(net.module.cuda())
    sweep = GraphedSweep(net, step_backends.autograd(net))
    for seed in (0, 1, 2, 3):
        _, *values, steps = problem("color_crop_cutout_flip_scale_rotate", soft, seed)
        start, target, x, y, lr = (value.cuda() for value in values)
        on_gpu = [step._replace(rows=step.rows.cuda()) for step in steps]
        expected = adjoint(net, start, target, x, y, lr, on_gpu, backend=step_backends.autograd(net))
        for draws in (StepDraws.join(on_gpu), StepDraws.join(on_gpu).to(x.device)):  # augmentations on the CPU, too
            actual = sweep(start, target, x, y, lr, draws)
            torch.testing.assert_close(actual.images, expected.images, rtol=1e-4, atol=1e-5)
    assert not sweep.graphed_step.failed
    assert any(graph is not None for graph, _ in sweep.graphed_step.graphs.values())
