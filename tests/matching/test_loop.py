"""The matching loop on a small problem: learning, the divergence guard, checkpoints, resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tadperf.config import Config, MatchConfig, NetConfig
from tadperf.experts import store
from tadperf.experts.store import Experts
from tadperf.experts.train import train_expert
from tadperf.matching import loop
from tadperf.matching.attempt import Attempt
from tadperf.matching.base import MatchProblem
from tadperf.matching.gradient import Gradient
from tadperf.matching.loop import Check, launch_iteration, match_trajectories
from tadperf.matching.starts import expert_soft_labels
from tadperf.matching.state import (
    EXPLODED,
    MatchState,
    apply_gradient,
    initial_state,
    load_checkpoint,
    save_checkpoint,
    step_back,
)
from tadperf.matching.trajectories import choose_gradient, draw_steps
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.nets.problem import Problem
from tadperf.nets.training import Recipe
from tadperf.run.folder import Run

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, SHAPE, CLASSES = torch.device("cpu"), (1, 8, 8), 3
NET = NetConfig(depth=1, width=4)
CHECKPOINT = Path("checkpoints", "matching.safetensors")


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Experts:
    """Returns two experts, trained for 6 epochs on noisy copies of three patterns."""
    folder = tmp_path_factory.mktemp("experts")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % CLASSES
    images = torch.randn(CLASSES, *SHAPE, generator=generator)[labels] + 0.5 * torch.randn(60, *SHAPE)
    for index in range(2):
        recipe = Recipe(6, 20, 0.05, 0.0, 0.0, "none", decay=False)
        problem = Problem(images, labels, tuple(map(str, range(CLASSES))), NET, "none", 0, CPU)
        store.save_expert(folder, index, train_expert(problem, recipe, index)[0])
    return Experts.open(folder, 2)


def match(**values: Any) -> MatchConfig:
    chosen = {
        "ipc": 2,
        "iterations": 20,
        "steps": 3,
        "expert_epochs": 2,
        "max_start": 3,
        "batch": 4,
        "lr_img": 2.0,
        "lr_init": 0.05,
        "check_every": 5,
    }
    return MatchConfig(**chosen | values)


def first(config: MatchConfig, soft: bool = False) -> MatchState:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2 * CLASSES, *SHAPE, generator=generator)
    labels = torch.arange(CLASSES).repeat_interleave(2)
    return initial_state(images, torch.eye(CLASSES)[labels] * 2 if soft else labels, config)


def constant(images: torch.Tensor, labels: torch.Tensor, lr: float, iteration: int) -> float:
    return 0.5


DATM = {"easy": 0.3, "widen": 0.5, "min_start": 1, "momentum_label": 0.9, "ema": 0.8}


def learn(
    place: Path,
    experts: Experts,
    config: MatchConfig,
    soft: bool = False,
    resume: bool = False,
    check: Check = constant,
    progress: Callable[..., None] = lambda *_, **__: None,
) -> tuple[MatchState, list[dict[str, Any]]]:
    """Returns the best state and the records of matching."""
    problem = MatchProblem(FlatNet(build(NET, SHAPE, CLASSES, 0)), experts, config, "color_crop_flip", 5)
    with Run.create(place, Config(match=config), resume) as run:
        (place / "checkpoints").mkdir(exist_ok=True)
        best = match_trajectories(first(config, soft), problem, check, run, progress)
    return best, [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def equal(a: MatchState, b: MatchState) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return all(ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours.keys() | theirs)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_loss_goes_down(tmp_path, experts, soft):
    _, records = learn(tmp_path / "run", experts, match(iterations=80), soft)
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 80
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


def test_the_guard_survives_a_huge_learning_rate_of_the_images(tmp_path, experts):
    for lr_img in (1e25, 1e39, 1e300):
        place = tmp_path / str(lr_img)
        best, records = learn(place, experts, match(lr_img=lr_img))
        assert best.images.isfinite().all()
        undone = [record for record in records if record.get("undone")]
        assert undone
        assert [record["lr_img"] for record in undone] == [lr_img / 2 ** (k + 1) for k in range(len(undone))]
        last = load_checkpoint(place / CHECKPOINT, CPU)[0]
        assert last.images.isfinite().all()
        assert last.iteration == 20
    best, _ = learn(tmp_path / "one", experts, match(lr_img=1e300, iterations=1))  # there is no later step
    assert best.images.isfinite().all()


def test_the_guard_survives_a_huge_learning_rate_of_the_student(tmp_path, experts):
    best, records = learn(tmp_path / "run", experts, match(lr_init=1e4, iterations=40))
    assert best.images.isfinite().all()
    assert any(record.get("undone") for record in records)
    assert records[-2]["loss"] < EXPLODED
    assert 0 < float(best.log_lr.exp()) < 1e4 / 8


def test_the_learned_rate_stays_positive(tmp_path, experts):
    best, records = learn(tmp_path / "run", experts, match(lr_lr=20.0, lr_init=0.5))
    rates = [record["lr"] for record in records if "lr" in record]
    assert all(0 < rate < math.inf for rate in rates)
    assert len(set(rates)) > 2
    assert float(best.log_lr.exp()) > 0


def test_the_update_is_sgd_with_momentum():
    config = match(momentum=0.7, lr_img=3.0, lr_label=0.5, lr_lr=0.1)
    state = first(config, soft=True)
    leaves = [value.clone() for value in (state.images, state.labels, state.log_lr)]
    rates = (config.lr_img, config.lr_label, config.lr_lr)
    optimiser = torch.optim.SGD([{"params": [p], "lr": r} for p, r in zip(leaves, rates, strict=True)], momentum=0.7)
    generator = torch.Generator().manual_seed(2)
    for k in range(4):
        images, labels = (torch.randn(value.shape, generator=generator) for value in leaves[:2])
        slope = torch.tensor([0.3, -40.0, 2.0, 1e4][k])  # d/d lr; clamped to -1 ... 1 after the chain rule
        nothing = torch.tensor(0.0)
        state = apply_gradient(state, Gradient(nothing, images, labels, slope, nothing), config)
        leaves[0].grad, leaves[1].grad = images, labels
        leaves[2].grad = (slope * leaves[2].exp()).clamp(-1, 1)
        optimiser.step()
    assert state.iteration == 4
    for ours, theirs in zip((state.images, state.labels, state.log_lr), leaves, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_step_back_returns_to_the_previous_state():
    config = match()
    previous = replace(first(config), iteration=3, image_velocity=torch.ones(6, *SHAPE))
    state = replace(previous, iteration=4, images=previous.images + 1e9, lr_img=1.0)
    restored = step_back(state, previous)
    assert (restored.iteration, restored.lr_img) == (5, 0.5)
    assert torch.equal(restored.images, previous.images)
    assert not restored.image_velocity.any()
    again = step_back(restored, None)
    assert torch.equal(again.images, restored.images)
    assert float(again.log_lr.exp()) == pytest.approx(config.lr_init / 2)


def test_every_pass_over_the_images_is_complete():
    drawn = draw_steps(match(steps=6, batch=4), 6, 8, "color_crop", torch.Generator().manual_seed(0)).split()
    assert [len(step.rows) for step in drawn] == [4] * 6
    passes = torch.cat([step.rows for step in drawn]).view(4, 6)
    assert torch.equal(passes.sort(1).values, torch.arange(6).expand(4, 6))
    assert len({tuple(order) for order in passes.tolist()}) > 1
    full_batch = draw_steps(match(steps=2, batch=None), 6, 8, "none", torch.Generator().manual_seed(0)).split()
    assert [sorted(step.rows.tolist()) for step in full_batch] == [list(range(6))] * 2
    assert full_batch[0].drawn == (None, None, None)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_a_checkpoint_holds_everything(tmp_path, soft):
    state = first(match(), soft)
    state = replace(state, iteration=7, lr_img=1 / 3, image_velocity=torch.randn(6, *SHAPE), log_lr=torch.tensor(-0.1))
    best, path = replace(state, images=-state.images), tmp_path / "matching.safetensors"
    for previous in (None, replace(state, iteration=6)):
        save_checkpoint(path, state, previous, best, 0.1 + 0.2)
        loaded = load_checkpoint(path, CPU)
        assert equal(loaded[0], state)
        assert equal(loaded[2], best)
        assert loaded[3] == 0.1 + 0.2
        assert (loaded[0].iteration, loaded[0].lr_img) == (7, 1 / 3)
        assert loaded[1] is None if previous is None else equal(loaded[1], previous)  # pyright: ignore


class KilledError(Exception):
    """Simulates a kill."""


@pytest.mark.parametrize("base", [{}, DATM], ids=["mtt", "datm with an average"])
@pytest.mark.parametrize("save_every", [0.0, math.inf], ids=["saved always", "saved at checks"])
def test_an_interrupted_loop_ends_with_the_same_bytes(tmp_path, experts, monkeypatch, save_every, base):
    monkeypatch.setattr(loop, "SAVE_EVERY", save_every)
    config = match(lr_img=1e6, **base)  # large, so that the guard acts too
    best, records = learn(tmp_path / "whole", experts, config, soft=True)
    for moment in (3, 8, 14, 20):

        def stop(stage: str, done: int, total: int, moment: int = moment, **_: object) -> None:
            if done == moment:
                raise KilledError

        with pytest.raises(KilledError):
            learn(tmp_path / "cut", experts, config, True, (tmp_path / "cut").exists(), progress=stop)
    again, cut = learn(tmp_path / "cut", experts, config, True, True)
    assert equal(again, best)
    assert cut == records
    assert (tmp_path / "cut" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()


@pytest.mark.parametrize("save_every", [0.0, math.inf], ids=["saved always", "saved at checks"])
@pytest.mark.parametrize("values", [{}, {"lr_img": 1e30}, {"lr_init": 1e4}, DATM | {"lr_img": 1e30, "trajectories": 2}])
def test_reading_an_iteration_late_changes_no_byte(tmp_path, experts, monkeypatch, values, save_every):
    """As on CUDA: the next iteration is launched first, and is thrown away if this one has diverged."""
    monkeypatch.setattr(loop, "SAVE_EVERY", save_every)
    launched: dict[str, list[int]] = {"at once": [], "late": []}
    results = []
    for name, devices in (("at once", ()), ("late", ("cpu",))):
        monkeypatch.setattr(loop, "WORKS_AHEAD", devices)

        def launch(state: MatchState, *rest: Any, name: str = name) -> Attempt:
            launched[name].append(state.iteration)
            return launch_iteration(state, *rest)

        monkeypatch.setattr(loop, "launch_iteration", launch)
        best, records = learn(tmp_path / name, experts, match(**values), soft=True)
        results.append((best.tensors(), records, (tmp_path / name / CHECKPOINT).read_bytes()))
    (best, records, checkpoint), (other, *late) = results
    assert late == [records, checkpoint]
    assert all(torch.equal(best[name], other[name]) for name in best)
    undone = {record["step"] for record in records if record.get("undone")}
    assert bool(undone) == bool(values)
    assert launched["at once"] == list(range(20))
    thrown_away = [step for step in sorted(undone) if step % 5 and step < 20]
    assert sorted(launched["late"]) == sorted([*range(20), *thrown_away])


@pytest.mark.parametrize("name", ["images", "labels", "lr", "loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_iteration_with_a_value_that_is_not_finite_has_diverged(name, value):
    config = match()
    state = first(config, soft=True)
    zeros = (torch.zeros(()), torch.zeros_like(state.images), torch.zeros_like(state.labels), torch.zeros(()))
    gradient = Gradient(*zeros, torch.zeros(7), torch.tensor([0.25, 0.5]))
    finite = Attempt.launch(state, gradient, config).outcome(config)
    assert finite == (0.0, pytest.approx(config.lr_init), False, [0.25, 0.5])
    damaged = getattr(gradient, name).clone()
    damaged.view(-1)[-1] = value
    assert Attempt.launch(state, gradient._replace(**{name: damaged}), config).outcome(config).diverged
    for loss, diverged in ((0.99 * EXPLODED, False), (EXPLODED, True)):
        large = gradient._replace(loss=torch.tensor(loss))
        assert Attempt.launch(state, large, config).outcome(config).diverged == diverged


def test_the_loss_of_each_layer_is_logged(tmp_path, experts):
    _, records = learn(tmp_path / "run", experts, match(iterations=2, trajectories=2))
    layers = [record["layers"] for record in records if "loss" in record]
    assert [list(by_name) for by_name in layers] == [["0", "1", "5"]] * 2  # convolution, norm and classifier
    assert all(0 < value < 2 for by_name in layers for value in by_name.values())


def test_the_best_held_out_accuracy_wins_and_a_tie_goes_to_the_later_one(tmp_path, experts):
    seen: dict[int, torch.Tensor] = {}

    def check(images: torch.Tensor, labels: torch.Tensor, lr: float, iteration: int) -> float:
        seen[iteration] = images.clone()
        return {5: 0.2, 10: 0.9, 15: 0.9, 18: 0.3}[iteration]

    best, records = learn(tmp_path / "run", experts, match(iterations=18), check=check)
    assert best.iteration == 15
    assert torch.equal(best.images, seen[15])
    assert [record["held_out"] for record in records if "held_out" in record] == [0.2, 0.9, 0.9, 0.3]


def test_the_average_is_checked_and_returned(tmp_path, experts):
    seen: dict[int, torch.Tensor] = {}

    def check(images: torch.Tensor, labels: torch.Tensor, lr: float, iteration: int) -> float:
        seen[iteration] = images.clone()
        return 0.5

    plain, _ = learn(tmp_path / "plain", experts, match(iterations=5, check_every=1), check=check)
    assert torch.equal(plain.average, plain.images)
    path = [first(match()).images, *(seen[i] for i in range(1, 6))]
    average = path[0]
    for images in path[1:]:
        average = 0.8 * average + 0.2 * images
    best, _ = learn(tmp_path / "ema", experts, match(iterations=5, check_every=1, ema=0.8), check=check)
    assert torch.equal(best.images, plain.images)  # the average does not change the learning
    torch.testing.assert_close(best.average, average, rtol=1e-5, atol=1e-6)
    assert torch.equal(seen[5], best.average)


def test_labels_have_their_own_momentum():
    config = match(momentum=0.5, momentum_label=0.9, lr_label=1.0)
    state, nothing = first(config, soft=True), torch.tensor(0.0)
    for _ in range(2):
        ones = torch.ones_like(state.images), torch.ones_like(state.labels)
        state = apply_gradient(state, Gradient(nothing, *ones, nothing, nothing), config)
    torch.testing.assert_close(first(config, soft=True).labels - state.labels, torch.full((6, 3), 1.0 + 1.9))
    torch.testing.assert_close(state.image_velocity, torch.full((6, *SHAPE), 1.5))


def test_soft_labels_are_the_mean_logits_of_the_experts(experts):
    net, images = FlatNet(build(NET, SHAPE, CLASSES, 0)), torch.randn(4, *SHAPE)
    logits = []
    for expert in range(2):
        torch.nn.utils.vector_to_parameters(experts.snapshot(expert, 6), net.module.parameters())
        logits.append(net.module(images))
    torch.testing.assert_close(expert_soft_labels(net, experts, images, 6), (logits[0] + logits[1]) / 2)


def test_soft_labels_are_the_mean_over_the_experts_that_are_correct(experts):
    net, images = FlatNet(build(NET, SHAPE, CLASSES, 0)), torch.randn(200, *SHAPE)
    logits = torch.stack([net(experts.snapshot(expert, 0), images) for expert in range(2)]).detach()
    labels = torch.arange(200) % CLASSES
    ours, says = expert_soft_labels(net, experts, images, 0, labels), logits.argmax(2) == labels
    assert {tuple(column) for column in says.t().tolist()} == {(a, b) for a in (True, False) for b in (True, False)}
    for i, (one, two) in enumerate(says.t().tolist()):
        truth = logits[:, i].mean(0) if one == two else logits[0 if one else 1, i]
        torch.testing.assert_close(ours[i], truth)


def test_the_backend_does_not_depend_on_the_iterations_that_are_left(experts):
    """A resumed run must use the same backend to the end: another backend would give other bytes."""
    net = FlatNet(build(NET.model_copy(update={"norm": "group", "width": 8}), SHAPE, CLASSES, 0))
    iterations = 10**9  # so many that compiling saves time
    problem = MatchProblem(net, experts, match(iterations=iterations), "none", 0)
    fresh = first(problem.config)
    names = [choose_gradient(replace(fresh, iteration=i), problem)[0].name for i in (0, iterations - 1)]
    assert names == ["compiled, functional"] * 2
