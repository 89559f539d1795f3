"""Influence matching (infmatch): its loss, its gradient, its real side, and the loop with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf.config import Config, MatchConfig, NetConfig
from tadperf.data import augment
from tadperf.experts import store
from tadperf.experts.store import Experts
from tadperf.matching import influence, loop, step_backends
from tadperf.matching.base import MatchProblem
from tadperf.matching.gradient import Gradient
from tadperf.matching.influence import (
    Influence,
    InfluenceMatching,
    RealInfluence,
    curvature,
    influence_gradient,
    relative_loss,
)
from tadperf.matching.loop import match_trajectories
from tadperf.matching.state import MatchState, initial_state
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.nets.students import Examples
from tadperf.run.folder import Run

pytestmark = pytest.mark.usefixtures("one_thread", "small_batches")
CPU, SHAPE, CLASSES, IPC = torch.device("cpu"), (1, 8, 8), 3, 2
STRATEGY = "color_crop_cutout_flip_scale_rotate"


@pytest.fixture
def small_batches(monkeypatch) -> None:
    monkeypatch.setattr(influence, "REAL_BATCH", 32)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def convnet(seed: int = 0) -> FlatNet:
    return FlatNet(build(NetConfig(depth=2, width=4), SHAPE, CLASSES, seed))


def smooth(dtype: torch.dtype) -> FlatNet:
    """Returns a network without kinks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(108, CLASSES)]
    return FlatNet(nn.Sequential(*layers).to(dtype))


def cross_entropy(net: FlatNet, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(theta, x), y.softmax(1) if y.is_floating_point() else y)


def exact_influence(net: FlatNet, theta: Tensor, real: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """Returns H_D G_S + H_S G_D and 2 H_D G_D by autograd, and G_D."""

    def gradient(*batch: Tensor) -> Callable[[Tensor], Tensor]:
        return torch.func.grad(lambda at: cross_entropy(net, at, *batch))

    of_real, of_synthetic = gradient(*real), gradient(x, y)

    def product(of: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        return torch.func.jvp(of, (theta,), (v,))[1]

    g_real, g_synthetic = of_real(theta), of_synthetic(theta)
    a = product(of_real, g_synthetic) + product(of_synthetic, g_real)
    return [a.detach(), 2 * product(of_real, g_real).detach(), g_real.detach()]


def exact_loss(net: FlatNet, theta: Tensor, real: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> float:
    a, b, _ = exact_influence(net, theta, real, x, y)
    parts = zip(a.split(list(net.layer_sizes.values())), b.split(list(net.layer_sizes.values())), strict=True)
    losses = [float((a - b).square().sum() / (a.square().sum() + b.square().sum())) for a, b in parts]
    return sum(losses) / len(losses)


def slope(function: Callable[[Tensor], float], values: Tensor, position: tuple[int, ...], step: float = 1e-5) -> float:
    sides = []
    for side in (step, -step):
        moved = values.clone()
        moved[position] += side
        sides.append(function(moved))
    return (sides[0] - sides[1]) / (2 * step)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_gradient_agrees_with_finite_differences_of_the_exact_loss(monkeypatch, soft):
    monkeypatch.setattr(influence, "STEP", 1e-4)
    net = smooth(torch.float64)
    theta, backend = net.flatten(), step_backends.autograd(net)
    real = normal(1, 9, *SHAPE, dtype=torch.float64), torch.arange(9) % CLASSES
    x = normal(3, 4, *SHAPE, dtype=torch.float64)
    y = normal(4, 4, CLASSES, dtype=torch.float64) if soft else torch.tensor([0, 1, 2, 0])
    _, b, g_real = exact_influence(net, theta, real, x, y)
    sizes = list(net.layer_sizes.values())
    layers, grad_x, grad_y = influence_gradient(backend, sizes, theta, Influence(g_real, b / 2), real, x, y)
    assert float(layers.mean()) == pytest.approx(exact_loss(net, theta, real, x, y), rel=1e-6)
    for image in range(4):
        steepest = int(grad_x[image].abs().argmax())
        pixel = (image, *map(int, np.unravel_index(steepest, SHAPE)))
        expected = slope(lambda x: exact_loss(net, theta, real, x, y), x, pixel)
        assert float(grad_x[pixel]) == pytest.approx(expected, rel=1e-5)
    assert (grad_y is not None) == soft
    if grad_y is not None:
        for logit in ((0, 0), (1, 2), (3, 1)):
            expected = slope(lambda y: exact_loss(net, theta, real, x, y), y, logit)
            assert float(grad_y[logit]) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_a_set_with_the_influence_of_the_real_one_has_loss_zero():
    """The real samples themselves: H_D G_S + H_S G_D = 2 H_D G_D. An empty influence has loss 1, its opposite 2."""
    net = convnet()
    theta, backend, sizes = net.flatten(), step_backends.eager(net), list(net.layer_sizes.values())
    x, y = normal(1, 30, *SHAPE), torch.arange(30) % CLASSES

    def gradient(at: Tensor) -> Tensor:
        return backend.gradient(at, x, y)

    g_real = gradient(theta)
    real = Influence(g_real, curvature(gradient, theta, g_real))
    assert float(influence_gradient(backend, sizes, theta, real, (x, y), x, y)[0].max()) < 1e-5
    b = normal(2, net.num_parameters)
    for a, expected in ((b, 0.0), (torch.zeros_like(b), 1.0), (-b, 2.0)):
        assert relative_loss(a, b, sizes)[0].tolist() == pytest.approx([expected] * len(sizes))


def test_differences_of_float32_gradients_are_close_to_the_hessian():
    """Without kinks. ReLU adds noise to a difference: bench/results/bases.md has figures."""
    net = smooth(torch.float32)
    x, y = normal(1, 60, *SHAPE), torch.arange(60) % CLASSES
    backend = step_backends.autograd(net)
    theta, v = net.flatten(), backend.gradient(net.flatten(), x, y)
    found = curvature(lambda at: backend.gradient(at, x, y), theta, v)
    exact = backend.products(theta, v, x, y, True).theta
    assert exact is not None
    assert float((found - exact).norm() / exact.norm()) < 1e-3


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Experts:
    """Returns two experts of 5 snapshots: random walks from two initial networks."""
    folder = tmp_path_factory.mktemp("experts")
    for index in range(2):
        start = convnet(index).flatten()
        store.save_expert(folder, index, start + 0.02 * normal(index, 5, len(start)).cumsum(0))
    return Experts.open(folder, 2)


def real_samples() -> Examples:
    labels = torch.arange(30) % CLASSES
    weights = torch.rand(30, generator=torch.Generator().manual_seed(3))
    weights[::7] = 0
    return Examples(normal(1, CLASSES, *SHAPE)[labels] + 0.5 * normal(2, 30, *SHAPE), labels, weights)


def match(**values: Any) -> MatchConfig:
    chosen = {"method": "infmatch", "ipc": IPC, "iterations": 12, "expert_epochs": 2, "max_start": 2, "lr_img": 1.0}
    return MatchConfig.model_validate(chosen | {"check_every": 5} | values)


def problem_of(experts: Experts, config: MatchConfig, strategy: str = STRATEGY) -> MatchProblem:
    return MatchProblem(convnet(), experts, config, strategy, 5, real_samples())


def first(config: MatchConfig, soft: bool) -> MatchState:
    labels = torch.arange(CLASSES).repeat_interleave(IPC)
    return initial_state(normal(5, IPC * CLASSES, *SHAPE), torch.eye(CLASSES)[labels] * 2 if soft else labels, config)


def test_the_real_side_is_the_weighted_mean_of_all_samples_once_for_each_snapshot(monkeypatch, experts):
    monkeypatch.setattr(influence, "BLOCK", 7)  # several blocks, and a smaller last one
    net = smooth(torch.float32)
    problem, theta = MatchProblem(net, experts, match(), "none", 5, real_samples()), net.flatten()
    real = RealInfluence(problem, CPU)
    found = real(1, 3, theta)
    images, labels, weights = real_samples()
    assert weights is not None
    assert isinstance(images, Tensor)

    def loss(at: Tensor) -> Tensor:
        return (weights * F.cross_entropy(net(at, images), labels, reduction="none")).sum() / weights.sum()

    torch.testing.assert_close(found.gradient, torch.func.grad(loss)(theta), rtol=1e-4, atol=1e-6)
    exact = torch.func.jvp(torch.func.grad(loss), (theta,), (found.gradient,))[1]
    assert float((found.curved - exact).norm() / exact.norm()) < 1e-3
    assert real(1, 3, theta) is found
    again = RealInfluence(problem, CPU)(1, 3, theta)
    assert torch.equal(again.curved, found.curved)


def test_real_batches_hold_samples_in_proportion_to_their_weights(experts):
    real = RealInfluence(problem_of(experts, match(), "none"), CPU)
    x, y = real.batch(3000, torch.Generator().manual_seed(0))
    images, labels, weights = real_samples()
    assert weights is not None
    assert isinstance(images, Tensor)
    which = (x.flatten(1)[:, None] == images.flatten(1)).all(2).int().argmax(1)
    assert torch.equal(labels[which], y)
    share = torch.bincount(which, minlength=30) / 3000
    assert not share[weights == 0].any()
    assert float((share - weights / weights.sum()).abs().max()) < 0.02


def learn(
    place: Path, experts: Experts, config: MatchConfig, soft: bool, resume: bool = False, stop: int = 0
) -> tuple[MatchState, list[dict[str, Any]]]:
    """Returns the best state and the records of matching. stop: the iteration at which it is interrupted."""

    def progress(stage: str, done: int, total: int, **_: object) -> None:
        if stop and done == stop:
            raise KeyboardInterrupt

    problem = MatchProblem(convnet(), experts, config, "crop_flip", 5, real_samples())
    with Run.create(place, Config(match=config), resume) as run:
        (place / "checkpoints").mkdir(exist_ok=True)
        best = match_trajectories(first(config, soft), problem, lambda *_: 0.5, run, progress)
    return best, [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_goes_down_and_the_learning_rate_stays(tmp_path, experts):
    best, records = learn(tmp_path / "run", experts, match(iterations=60, lr_img=10.0, lr_init=0.05), False)
    losses = [record["loss"] for record in records if "loss" in record]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert float(best.log_lr.exp()) == pytest.approx(0.05)
    assert all(record["layers"]["cross-entropy"] > 0 for record in records if "loss" in record)


def test_the_guard_survives_a_huge_learning_rate_of_the_images(tmp_path, experts):
    best, records = learn(tmp_path / "run", experts, match(lr_img=1e39), False)
    assert best.images.isfinite().all()
    assert any(record.get("undone") for record in records)


@pytest.mark.parametrize("values", [{}, {"batch": 3, "trajectories": 2, "ema": 0.8, "cross_entropy": 0.0}])
def test_an_interrupted_loop_ends_with_the_same_bytes(tmp_path, experts, monkeypatch, values):
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    soft = not values
    best, records = learn(tmp_path / "whole", experts, match(**values), soft)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "cut", experts, match(**values), soft, stop=7)
    again, cut = learn(tmp_path / "cut", experts, match(**values), soft, resume=True)
    assert all(torch.equal(value, again.tensors()[name]) for name, value in best.tensors().items())
    assert cut == records
    name = Path("checkpoints", "matching.safetensors")
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_draws_of_two_ranks_have_the_mean_of_one_process(experts):
    """`loop.mean_gradient` adds them up; its test with real ranks is in tests/compute/test_ranks.py."""
    config = match(trajectories=3)
    problem, state = problem_of(experts, config), first(config, True)
    single = loop.mean_gradient(state, InfluenceMatching(state, problem), 3)
    parts: list[Gradient] = []
    for rank in range(2):
        base = InfluenceMatching(state, problem)  # a process of its own has its own real side
        parts += base.gradients(state, range(rank, 3, 2))
    for name in ("loss", "images", "labels"):
        mean = torch.stack([getattr(part, name) for part in parts]).mean(0)
        torch.testing.assert_close(mean, getattr(single, name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_gradient_of_the_base_includes_augmentation_and_cross_entropy(experts, soft):
    config = match(batch=3, cross_entropy=0.7)
    problem, state = problem_of(experts, config), first(config, soft)
    base = InfluenceMatching(state, problem)
    found, draws = base.gradient(state, 1), base.draw(state, 1)
    x = state.images.clone().requires_grad_()
    logits = state.labels.clone().requires_grad_(soft)
    rows, drawn = draws.synthetic
    batch, y = augment.apply(x[rows], drawn), logits[rows]
    _, grad_x, grad_y = influence_gradient(
        base.backend, base.sizes, draws.first, draws.real, (draws.x, draws.y), batch.detach(), y.detach()
    )
    log_q = problem.net(draws.later, batch).log_softmax(1)
    p = y.softmax(1) if soft else F.one_hot(y, CLASSES).float()
    total = 0.7 * (torch.xlogy(p, p) - p * log_q).sum(1).mean() + (batch * grad_x).sum()
    if grad_y is not None:
        total = total + (y * grad_y).sum()
    expected = torch.autograd.grad(total, [x] + [logits] * soft)
    torch.testing.assert_close(found.images, expected[0], rtol=1e-3, atol=1e-5)
    assert (found.labels is not None) == soft
    if found.labels is not None:
        torch.testing.assert_close(found.labels, expected[1], rtol=1e-3, atol=1e-5)
