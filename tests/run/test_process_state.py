"""Functions of nets, experts and run do not change PyTorch's settings, the environment or a network's modes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tadperf.compute.workers import BackgroundTasks, run_parallel
from tadperf.config import ExpertConfig, NetConfig
from tadperf.config.merge import merge
from tadperf.experts import store
from tadperf.experts.store import Experts
from tadperf.experts.train import train_expert, train_experts
from tadperf.nets import students, training
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.nets.fused import fused_forward
from tadperf.nets.optimiser import sgd_step
from tadperf.nets.problem import Problem
from tadperf.nets.students import Examples, Student, StudentScorer
from tadperf.nets.training import Recipe
from tadperf.run import environment, folder

CPU, NET = torch.device("cpu"), NetConfig.model_validate({"depth": 1, "width": 4})
IMAGES, LABELS = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
RECIPE = Recipe(2, 5, 0.1, 0.9, 5e-4, "color_crop", rho=0.1)
PROBLEM = Problem(IMAGES, LABELS, ("a", "b", "c"), NET, "crop", 0, CPU)
EXAMPLES = Examples(IMAGES, LABELS)
STUDENT = Student("row", 0, NET, RECIPE, lambda: EXAMPLES)


def network() -> nn.Module:
    """Returns a network with one layer in train mode and one in eval mode."""
    module = nn.Sequential(build(NET, (1, 8, 8), 3, 0), nn.Identity())
    module.eval()
    module[1].train()
    return module


def modes(module: nn.Module) -> list[bool]:
    return [layer.training for layer in module.modules()]


def use_experts(tmp_path: Path, _: nn.Module) -> None:
    train_experts(tmp_path / "experts", PROBLEM, ExpertConfig.model_validate({"count": 2}), 1, {})
    experts = Experts.open(tmp_path / "experts", 2)
    experts.snapshot(1, 1)
    experts.train_accuracies()
    store.find_experts(tmp_path / "experts", 2, (2, FlatNet(build(NET, (1, 8, 8), 3, 0)).num_parameters), {})


def use_run(tmp_path: Path, _: nn.Module) -> None:
    config = merge("digits")
    with folder.Run.create(tmp_path / "run", config) as run:
        with run.stage("matching"):
            run.log("matching", 1)
        run.rewind("matching", 0)
        run.finish({})
    folder.finished_result(tmp_path / "run", config)


def use_background_tasks(tmp_path: Path, _: nn.Module) -> None:
    with BackgroundTasks() as pool:
        pool.start(lambda item: item, [1, 2], 2)
        assert len(list(pool.as_completed())) == 2


def use_steps(tmp_path: Path, module: nn.Module) -> None:
    parameters = tuple(module.parameters())

    def gradient() -> tuple[Tensor, ...]:
        losses = [training.batch_loss(module, IMAGES, LABELS, None)]
        return training.summed_gradient(losses, parameters)

    velocity = tuple(map(torch.zeros_like, parameters))
    sgd_step(parameters, velocity, training.gsam_gradient(gradient, parameters, 0.1, 0.1), 0.1, 0.9, 0.0)
    for epoch in training.epochs(IMAGES, RECIPE, 0, CPU):
        list(epoch)


CASES: dict[str, Callable[[Path, nn.Module], Any]] = {
    "accuracy": lambda _, module: training.accuracy(module, IMAGES, LABELS),
    "fused_forward": lambda _, module: fused_forward(module)(IMAGES),
    "build": lambda *_: build(NET, (1, 8, 8), 3, 0),
    "fit": lambda *_: training.fit(build(NET, (1, 8, 8), 3, 0), IMAGES, LABELS, RECIPE, 0),
    "steps": use_steps,
    "train_student": lambda *_: students.train_student(EXAMPLES, 3, NET, RECIPE, 0, CPU),
    "score_students": lambda *_: students.score_students(
        StudentScorer(IMAGES, LABELS, 3, 0, CPU), [STUDENT, STUDENT], lambda *_: None
    ),
    "train_expert": lambda *_: train_expert(PROBLEM, RECIPE, 0),
    "experts": use_experts,
    "run": use_run,
    "describe_environment": lambda *_: environment.describe_environment("auto"),
    "run_parallel": lambda *_: list(run_parallel(lambda item: item, [1, 2, 3], 2)),
    "background_tasks": use_background_tasks,
}


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Uses two threads, because one thread would hide a function that leaves one thread set."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def state() -> list[Any]:
    return [
        torch.get_num_threads(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        dict(os.environ),
        os.getcwd(),
    ]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", CASES)
def test_the_state_of_the_process_and_of_the_network_is_as_before(tmp_path, name):
    module = network()
    before, modes_before = state(), modes(module)
    CASES[name](tmp_path, module)
    assert state() == before
    assert modes(module) == modes_before == [False, False, False, False, False, False, False, False, True]


def test_accuracy_restores_the_modes_after_an_error():
    module = network()
    before = modes(module)
    with pytest.raises(RuntimeError):
        training.accuracy(module, torch.zeros(4, 3, 8, 8), LABELS)
    assert modes(module) == before


def test_a_single_process_yields_results_with_the_threads_of_the_caller():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tasks = run_parallel(lambda _: torch.get_num_threads(), [1, 2], 1)
        assert [(threads, torch.get_num_threads()) for _, threads in tasks] == [(1, 2), (1, 2)]
    finally:
        torch.set_num_threads(before)
