"""Trajectory matching: draws a part of an expert's trajectory, and the inner steps that must imitate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.compute import ranks
from tadperf.compute.transfer import upload_all
from tadperf.config import MatchConfig
from tadperf.data import augment
from tadperf.data.image_draws import ImageDraws
from tadperf.matching.base import Base, MatchProblem, draw_generator
from tadperf.matching.cuda_graph_sweep import GraphedSweep
from tadperf.matching.gradient import GRADIENTS, Gradient, StepDraws, scaled_gradients
from tadperf.matching.starts import start_range
from tadperf.matching.state import MatchState
from tadperf.matching.step_backends import StepBackend, choose_step_backend

# (start, target, images, labels, lr, drawn) -> Gradient
TrajectoryGradient = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, StepDraws], Gradient]


def draw_steps(config: MatchConfig, count: int, size: int, strategy: str, generator: torch.Generator) -> StepDraws:
    """Draws T inner steps: batches from shuffled passes over `count` images of `size` pixels, with augmentations."""
    batch = min(config.batch or count, count)
    drawn_images = config.steps * batch
    passes = -(-drawn_images // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])[:drawn_images]
    drawn = augment.draw(strategy, drawn_images, size, generator)
    return StepDraws(ImageDraws(order, drawn), (batch,) * config.steps)


class Trajectory(NamedTuple):
    """A drawn part of an expert's trajectory, and the inner steps that imitate it."""

    start: Tensor  # [P]
    target: Tensor  # [P]
    drawn: StepDraws


def draw_trajectory(state: MatchState, problem: MatchProblem, trajectory: int = 0) -> Trajectory:
    """Draws an expert, its start epoch and the inner steps.

    trajectory: its number in this iteration, from 0 to match.trajectories - 1.
    """
    config, experts = problem.config, problem.experts
    generator = draw_generator(problem, state, trajectory)
    expert = int(torch.randint(len(experts), (), generator=generator))
    first, last = start_range(config, state.iteration)
    start = int(torch.randint(first, last + 1, (), generator=generator))
    device = state.images.device
    drawn = draw_steps(config, len(state.images), state.images.shape[-1], problem.augment, generator).to(device)
    epochs = (start, start + config.expert_epochs)
    start_point, target = upload_all([experts.snapshot(expert, epoch) for epoch in epochs], device)
    return Trajectory(start_point, target, drawn)


def matching_gradient(
    state: MatchState, compute: TrajectoryGradient, problem: MatchProblem, trajectory: int = 0
) -> Gradient:
    """Draws a trajectory and computes the gradient of the matching loss."""
    start, target, drawn = draw_trajectory(state, problem, trajectory)
    return compute(start, target, state.images, state.labels, state.log_lr.exp(), drawn)


def joins_trajectories(config: MatchConfig, device: torch.device) -> bool:
    """Returns whether this rank measures the distances of its trajectories together: several of them, on CUDA.

    `compute` then returns unscaled gradients. A CPU keeps one call a trajectory, and with it the order of its sums.
    """
    several = len(range(ranks.rank(), config.trajectories, ranks.world_size())) > 1
    return several and device.type == "cuda" and config.gradient != "unroll"


def joined_gradients(
    state: MatchState, compute: TrajectoryGradient, problem: MatchProblem, numbers: Sequence[int]
) -> list[Gradient]:
    """Returns the gradients of several trajectories. Keeps three vectors [P] of each one until the last is done."""
    trajectories, lr = [draw_trajectory(state, problem, number) for number in numbers], state.log_lr.exp()
    parts = [compute(start, target, state.images, state.labels, lr, drawn) for start, target, drawn in trajectories]
    starts, targets, _ = zip(*trajectories, strict=True)
    return scaled_gradients(parts, starts, targets, list(problem.net.layer_sizes.values()))


def choose_gradient(state: MatchState, problem: MatchProblem) -> tuple[StepBackend, TrajectoryGradient]:
    """Chooses how this run computes an inner step, and the gradient of a trajectory."""
    config, net = problem.config, problem.net
    batch = min(config.batch or len(state.images), len(state.images))
    shape, device = (batch, *state.images.shape[1:]), state.images.device
    # Passes all iterations of the run, not only those left: a resumed run must choose the same backend.
    backend = choose_step_backend(config, net, shape, device, config.iterations)
    scaled = not joins_trajectories(config, device)
    if device.type == "cuda" and config.compile != "off" and config.gradient != "unroll":
        return backend, GraphedSweep(net, backend, config.gradient == "adjoint", scaled)
    gradient = partial(GRADIENTS[config.gradient], net, backend=backend, **({} if scaled else {"scaled": False}))
    return backend, lambda *values: gradient(*values[:-1], values[-1].split())


class TrajectoryMatching(Base):
    """The base of MTT, FTD and DATM: T inner steps on the synthetic images must move a student as the experts moved."""

    learns_lr = True

    def __init__(self, state: MatchState, problem: MatchProblem) -> None:
        super().__init__(state, problem)
        self.layers = list(problem.net.layer_sizes)
        backend, self.compute = choose_gradient(state, problem)
        self.cache = backend.cache

    def gradient(self, state: MatchState, number: int) -> Gradient:
        return matching_gradient(state, self.compute, self.problem, number)

    def gradients(self, state: MatchState, numbers: Sequence[int]) -> list[Gradient]:
        if joins_trajectories(self.problem.config, state.images.device):
            return joined_gradients(state, self.compute, self.problem, numbers)
        return super().gradients(state, numbers)
