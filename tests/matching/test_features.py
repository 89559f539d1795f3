"""Feature matching (tgdd): its gradient, its real features, and the loop with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.config import Config, MatchConfig, NetConfig
from tadperf.data import augment
from tadperf.experts import store
from tadperf.experts.store import Experts
from tadperf.matching import loop
from tadperf.matching.base import MatchProblem
from tadperf.matching.class_features import ClassMeans, FeatureNet, RealFeatures
from tadperf.matching.features import (
    FeatureMatching,
    GraphedFeatures,
    Snapshots,
    batch_gradient,
    choose_feature_gradient,
    draw_rows,
    eager_gradient,
    functional_gradient,
)
from tadperf.matching.gradient import Gradient
from tadperf.matching.loop import match_trajectories
from tadperf.matching.state import MatchState, initial_state, load_checkpoint
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.nets.students import Examples
from tadperf.run.folder import Run

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, SHAPE, CLASSES, IPC = torch.device("cpu"), (1, 8, 8), 3, 2
NET = NetConfig(depth=2, width=4)
STRATEGY = "color_crop_cutout_flip_scale_rotate"
CHECKPOINT = Path("checkpoints", "matching.safetensors")


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> FlatNet:
    return FlatNet(build(NET, SHAPE, CLASSES, seed).to(dtype))


def real_samples() -> Examples:
    """Returns 30 noisy copies of three patterns, with weights; some have the weight 0."""
    labels = torch.arange(30) % CLASSES
    weights = torch.rand(30, generator=torch.Generator().manual_seed(3))
    weights[::7] = 0
    return Examples(normal(1, CLASSES, *SHAPE)[labels] + 0.5 * normal(2, 30, *SHAPE), labels, weights)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Experts:
    """Returns two experts of 5 snapshots: random walks from two initial networks."""
    folder = tmp_path_factory.mktemp("experts")
    for index in range(2):
        start = network(seed=index).flatten()
        store.save_expert(folder, index, start + 0.02 * normal(index, 5, len(start)).cumsum(0))
    return Experts.open(folder, 2)


def match(**values: Any) -> MatchConfig:
    chosen = {
        "method": "tgdd",
        "ipc": IPC,
        "iterations": 20,
        "expert_epochs": 2,
        "max_start": 2,
        "lr_img": 2.0,
        "lr_init": 0.05,
        "check_every": 5,
    }
    return MatchConfig.model_validate(chosen | values)


def first(config: MatchConfig, soft: bool) -> MatchState:
    labels = torch.arange(CLASSES).repeat_interleave(IPC)
    return initial_state(normal(5, IPC * CLASSES, *SHAPE), torch.eye(CLASSES)[labels] * 2 if soft else labels, config)


def learn(
    place: Path,
    experts: Experts,
    config: MatchConfig,
    soft: bool = False,
    resume: bool = False,
    progress: Callable[..., None] = lambda *_, **__: None,
) -> tuple[MatchState, list[dict[str, Any]]]:
    """Returns the best state and the records of matching."""
    problem = MatchProblem(network(), experts, config, "crop_flip", 5, real_samples())
    with Run.create(place, Config(match=config), resume) as run:
        (place / "checkpoints").mkdir(exist_ok=True)
        best = match_trajectories(first(config, soft), problem, lambda *_: 0.5, run, progress)
    return best, [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_gradient_agrees_with_finite_differences(soft, weight):
    net = network(torch.float64)
    features = FeatureNet(net, fused=False)
    theta, later = net.flatten(), net.flatten() + 0.1 * normal(1, net.num_parameters, dtype=torch.float64)
    means, scatter = normal(2, CLASSES, features.width, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    images = normal(3, 6, *SHAPE, dtype=torch.float64)
    labels = normal(4, 6, CLASSES, dtype=torch.float64) if soft else torch.arange(CLASSES).repeat_interleave(2)
    rows = torch.tensor([1, 3, 4])  # one image of each class; the others get no gradient
    drawn = augment.draw(STRATEGY, 3, 8, torch.Generator().manual_seed(0))
    real = Snapshots(theta, later, ClassMeans(means, scatter))

    def loss(images: Tensor, labels: Tensor) -> float:
        """The formulas in the docstring of the module, by the plain network."""
        torch.nn.utils.vector_to_parameters(theta.clone(), net.module.parameters())
        x = augment.apply(images[rows], drawn)
        assert isinstance(net.module, torch.nn.Sequential)
        distance = (net.module[:-1](x) - means).square().sum() / CLASSES / scatter
        torch.nn.utils.vector_to_parameters(later.clone(), net.module.parameters())
        log_q, y = net.module(x).log_softmax(1), labels[rows]
        p = y.softmax(1) if soft else F.one_hot(y, CLASSES).double()
        return float(distance.detach() + weight / scatter * (torch.xlogy(p, p) - p * log_q.detach()).sum(1).mean())

    compute = eager_gradient(features, weight, torch.float32)
    gradient = batch_gradient(compute, weight, real, images, labels, rows, drawn)
    assert float(gradient.loss) == pytest.approx(loss(images, labels), rel=1e-9)
    assert gradient.layers is not None
    assert float(gradient.layers[0] + weight / scatter * gradient.layers[1]) == pytest.approx(float(gradient.loss))
    assert not gradient.images[[0, 2, 5]].any()
    for image in rows.tolist():
        steepest = int(gradient.images[image].abs().argmax())
        pixel = (image, *map(int, np.unravel_index(steepest, SHAPE)))
        assert slope(lambda x: loss(x, labels), images, pixel) == pytest.approx(float(gradient.images[pixel]), rel=1e-5)
    assert (gradient.labels is not None) == soft
    if gradient.labels is not None:
        for logit in ((1, 0), (4, 2), (0, 0)):
            expected = pytest.approx(float(gradient.labels[logit]), rel=1e-5, abs=1e-10)
            assert slope(lambda y: loss(images, y), labels, logit) == expected


def slope(function: Callable[[Tensor], float], values: Tensor, position: tuple[int, ...], step: float = 1e-6) -> float:
    sides = []
    for side in (step, -step):
        moved = values.clone()
        moved[position] += side
        sides.append(function(moved))
    return (sides[0] - sides[1]) / (2 * step)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("form", ["fused", "functional"])
def test_every_form_gives_the_gradient_of_autograd(form, soft):
    net = network()
    plain = FeatureNet(net, fused=False)
    x, labels = normal(3, 6, *SHAPE), normal(4, 6, CLASSES) if soft else torch.arange(CLASSES).repeat_interleave(2)
    later = net.flatten() + 0.1 * normal(1, net.num_parameters)
    arguments = (net.flatten(), later, normal(2, CLASSES, plain.width), torch.tensor(3.0), x, labels)
    expected = eager_gradient(plain, 0.7, torch.float32)(*arguments)
    if form == "fused":
        found = eager_gradient(FeatureNet(net, fused=True), 0.7, torch.float32)(*arguments)
    else:
        found = functional_gradient(plain, 0.7, torch.float32)(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["convnet", "resnet18", "alexnet", "vgg11"])
def test_features_and_logits_are_those_of_the_network(name):
    shape = (3, 32, 32)
    net = FlatNet(build(NetConfig(name=name, width=8), shape, CLASSES, 0))
    other, x = FlatNet(build(NetConfig(name=name, width=8), shape, CLASSES, 1)), normal(0, 2, *shape)
    for fused in (False, True):
        features = FeatureNet(net, fused)
        found = features.features(other.flatten(), x)
        assert found.shape == (2, features.width)
        torch.testing.assert_close(features.logits(other.flatten(), found), other.module(x), rtol=1e-3, atol=1e-4)


def test_class_means_are_the_weighted_means_of_all_samples(monkeypatch, experts):
    monkeypatch.setattr("tadperf.matching.class_features.BLOCK", 7)  # several blocks, and a smaller last one
    real, theta = real_samples(), experts.snapshot(1, 3)
    problem = MatchProblem(network(), experts, match(), "none", 0, real)
    found = RealFeatures(problem, FeatureNet(problem.net, fused=True), CPU)(1, 3, theta)
    torch.nn.utils.vector_to_parameters(theta, problem.net.module.parameters())
    assert isinstance(real.images, Tensor)
    assert isinstance(problem.net.module, torch.nn.Sequential)
    assert real.weights is not None
    features = problem.net.module[:-1](real.images).detach().double().numpy()
    weights, labels = real.weights.double().numpy(), real.labels.numpy()
    for label in range(CLASSES):
        mean = np.average(features[labels == label], axis=0, weights=weights[labels == label])
        assert found.means[label].numpy() == pytest.approx(mean, rel=1e-4, abs=1e-5)
    variance = np.average((features - np.average(features, axis=0, weights=weights)) ** 2, axis=0, weights=weights)
    assert float(found.scatter) == pytest.approx(variance.sum(), rel=1e-4)


def test_real_features_are_computed_once_for_each_snapshot_with_the_same_bytes(monkeypatch, experts):
    problem = MatchProblem(network(), experts, match(), STRATEGY, 0, real_samples())
    net = FeatureNet(problem.net, fused=True)
    calls: list[tuple[int, int]] = []
    compute = RealFeatures._compute

    def counted(self: RealFeatures, key: tuple[int, int], theta: Tensor) -> ClassMeans:
        calls.append(key)
        return compute(self, key, theta)

    monkeypatch.setattr(RealFeatures, "_compute", counted)
    keys = [(0, 1), (1, 1), (0, 2)]
    real, again = (RealFeatures(problem, net, CPU) for _ in range(2))
    one = [real(*key, experts.snapshot(*key)) for key in keys + keys]
    assert calls == keys
    other = {key: again(*key, experts.snapshot(*key)) for key in reversed(keys)}  # another order of snapshots
    for key, first_time, second_time in zip(keys, one[:3], one[3:], strict=True):
        assert second_time is first_time
        assert torch.equal(other[key].means, first_time.means)
    assert not torch.equal(one[0].means, one[1].means)
    calls.clear()
    monkeypatch.setattr("tadperf.matching.class_features.KEPT_BYTES", 4 * CLASSES * net.width * 2)  # two snapshots
    small = RealFeatures(problem, net, CPU)
    for key in (*keys, keys[2], keys[0]):
        small(*key, experts.snapshot(*key))
    assert calls == [*keys, keys[0]]


def test_a_draw_takes_the_same_number_of_images_of_each_class():
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(draw_rows(12, 3, None, generator), torch.arange(12))
    assert torch.equal(draw_rows(12, 3, 12, generator), torch.arange(12))
    drawn = [draw_rows(12, 3, 7, generator) for _ in range(20)]
    for rows in drawn:
        assert (rows // 4).tolist() == [0, 0, 1, 1, 2, 2]
        assert len(rows.unique()) == 6
    assert torch.cat(drawn).unique().tolist() == list(range(12))


def test_the_later_snapshot_is_of_the_same_expert_and_not_too_far(experts):
    config = match(expert_epochs=2, max_start=2, batch=3)
    problem = MatchProblem(network(), experts, config, STRATEGY, 5, real_samples())
    base, state = FeatureMatching(first(config, False), problem), first(config, False)
    snapshots = {(e, t): experts.snapshot(e, t) for e in range(2) for t in range(5)}
    seen = set()
    for number in range(60):
        drawn = base.draw(state, number)[0]
        (start,) = (key for key, theta in snapshots.items() if torch.equal(theta, drawn.first))
        (later,) = (key for key, theta in snapshots.items() if torch.equal(theta, drawn.later))
        assert start[0] == later[0]
        seen.add((start[1], later[1] - start[1]))
    assert seen == {(start, distance) for start in range(3) for distance in range(3)}


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_loss_goes_down_and_the_learning_rate_stays(tmp_path, experts, soft, weight):
    best, records = learn(tmp_path / "run", experts, match(iterations=100, lr_img=5.0, cross_entropy=weight), soft)
    losses = [record["loss"] for record in records if "loss" in record]
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])
    assert float(best.log_lr.exp()) == pytest.approx(0.05)
    layers = [record["layers"] for record in records if "loss" in record]
    assert all(list(values) == ["features", "cross-entropy"] for values in layers)
    assert all((values["cross-entropy"] > 0) == bool(weight) for values in layers)


def test_the_guard_survives_a_huge_learning_rate_of_the_images(tmp_path, experts):
    for lr_img in (1e39, 1e300):  # beyond float32
        best, records = learn(tmp_path / str(lr_img), experts, match(lr_img=lr_img))
        assert best.images.isfinite().all()
        assert any(record.get("undone") for record in records)
        last = load_checkpoint(tmp_path / str(lr_img) / CHECKPOINT, CPU)[0]
        assert last.images.isfinite().all()
        assert float(last.log_lr.exp()) == pytest.approx(0.05)  # the guard does not blame it


class KilledError(Exception):
    """Simulates a kill."""


@pytest.mark.parametrize("values", [{}, {"batch": 3, "trajectories": 2, "ema": 0.8, "lr_img": 1e30}])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_an_interrupted_loop_ends_with_the_same_bytes(tmp_path, experts, monkeypatch, values, soft):
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    config = match(**values)
    best, records = learn(tmp_path / "whole", experts, config, soft)
    for moment in (3, 8, 14):

        def stop(stage: str, done: int, total: int, moment: int = moment, **_: object) -> None:
            if done == moment:
                raise KilledError

        with pytest.raises(KilledError):
            learn(tmp_path / "cut", experts, config, soft, (tmp_path / "cut").exists(), stop)
    again, cut = learn(tmp_path / "cut", experts, config, soft, True)
    assert all(torch.equal(value, again.tensors()[name]) for name, value in best.tensors().items())
    assert cut == records
    assert (tmp_path / "cut" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_draws_of_two_ranks_have_the_mean_of_one_process(experts, soft):
    """`loop.mean_gradient` adds them up; its test with real ranks is in tests/compute/test_ranks.py."""
    config = match(trajectories=3)
    problem = MatchProblem(network(), experts, config, STRATEGY, 5, real_samples())
    state = first(config, soft)
    single = loop.mean_gradient(state, FeatureMatching(state, problem), 3)
    parts: list[Gradient] = []
    for rank in range(2):
        base = FeatureMatching(state, problem)  # a process of its own has its own real features
        parts += base.gradients(state, range(rank, 3, 2))
    for name in ("loss", "images", *["labels"] * soft):
        mean = torch.stack([getattr(part, name) for part in parts]).mean(0)
        torch.testing.assert_close(mean, getattr(single, name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_memory_of_the_graph_holds_the_gradient(experts, soft):
    """Without a GPU it runs without a graph."""
    config = match()
    problem = MatchProblem(network(), experts, config, STRATEGY, 5, real_samples())
    state = first(config, soft)
    base = FeatureMatching(state, problem)
    graphed: Any = GraphedFeatures(choose_feature_gradient(problem, CPU)[1], config.cross_entropy)
    graphed.graphed_step = graphed._write
    found, expected = [], []
    for number in range(3):
        snapshots, draws = base.draw(state, number)
        found.append(graphed(snapshots, state.images, state.labels, draws.order, draws.drawn))
        expected.append(base.gradient(state, number))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(ours.layers, theirs.layers)
        assert (ours.labels is None) == (not soft)
        assert not soft or torch.equal(ours.labels, theirs.labels)


def test_compiled_code_gives_the_gradient_of_autograd(experts):
    pytest.importorskip("torch._inductor")
    problem = MatchProblem(network(), experts, match(compile="on"), STRATEGY, 5, real_samples())
    state = first(problem.config, True)
    compiled = FeatureMatching(state, problem)
    assert compiled.cache
    plain = FeatureMatching(state, MatchProblem(network(), experts, match(), STRATEGY, 5, real_samples()))
    assert plain.cache is None
    ours, theirs = compiled.gradient(state, 0), plain.gradient(state, 0)
    for name in ("loss", "images", "labels", "layers"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-6)


def test_bfloat16_convolutions_are_close(experts):
    state = first(match(), False)
    gradients = []
    for precision in ("float32", "bfloat16"):
        problem = MatchProblem(network(), experts, match(precision=precision), STRATEGY, 5, real_samples())
        gradients.append(FeatureMatching(state, problem).gradient(state, 0))
    exact, rough = gradients
    assert rough.images.dtype == torch.float32
    assert 0 < float((exact.images - rough.images).norm() / exact.images.norm()) < 0.1
    assert math.isclose(float(exact.loss), float(rough.loss), rel_tol=0.05)
