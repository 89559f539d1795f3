"""The matching loop: learns synthetic images whose training trajectory imitates the experts' trajectories."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.compute import ranks
from tadperf.compute.compile import save_compile_cache
from tadperf.compute.transfer import upload_all
from tadperf.config import MatchConfig
from tadperf.data import augment
from tadperf.data.image_draws import ImageDraws
from tadperf.experts.store import Experts, ResidentExperts
from tadperf.matching.attempt import Attempt
from tadperf.matching.cuda_graph_sweep import GraphedSweep
from tadperf.matching.gradient import GRADIENTS, Gradient, StepDraws, scaled_gradients
from tadperf.matching.starts import start_range
from tadperf.matching.state import MatchState, load_checkpoint, save_checkpoint, step_back
from tadperf.matching.step_backends import StepBackend, choose_step_backend
from tadperf.nets.flat import FlatNet
from tadperf.progress import Progress, silent
from tadperf.run.folder import Run

SAVE_EVERY = 10.0  # seconds between checkpoints, not tuned; the moment of a checkpoint changes no result
MEAN_LOSSES = 20  # iterations whose mean loss is reported, not tuned
WORKS_AHEAD = ("cuda",)  # devices that compute while the CPU does something else

Check = Callable[[Tensor, Tensor, float, int], float]  # images, labels, lr, iteration -> accuracy on held-out samples
# (start, target, images, labels, lr, drawn) -> Gradient
TrajectoryGradient = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, StepDraws], Gradient]


@dataclass(frozen=True)
class MatchProblem:
    """The constant inputs of the matching loop.

    net: the network of experts and students. augment: the strategy of data.augment. seed: all draws derive from it.
    """

    net: FlatNet
    experts: Experts | ResidentExperts
    config: MatchConfig
    augment: str
    seed: int


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
    generator = seeds.generator(problem.seed, "match", state.iteration, *([trajectory] if trajectory else []))
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


def mean_gradient(state: MatchState, compute: TrajectoryGradient, problem: MatchProblem) -> Gradient:
    """Returns the mean gradient over the trajectories of this iteration, which the ranks divide (tadperf).

    A rank without a trajectory adds zeros. `end` is that of a trajectory of this rank, and `layers` are the means over
    its trajectories.
    """
    trajectories = problem.config.trajectories
    numbers = range(ranks.rank(), trajectories, ranks.world_size())
    if joins_trajectories(problem.config, state.images.device):
        parts = joined_gradients(state, compute, problem, numbers)
    else:
        parts = [matching_gradient(state, compute, problem, number) for number in numbers] or [_zero_gradient(state)]
    if trajectories == ranks.world_size() == 1:
        return parts[0]
    names = [name for name in ("loss", "images", "labels", "lr") if getattr(parts[0], name) is not None]
    sums = reduce(torch._foreach_add, [[getattr(part, name) for name in names] for part in parts])
    layers = [part.layers for part in parts if part.layers is not None]
    means = dict(zip(names, ranks.mean(sums, trajectories), strict=True))
    return parts[0]._replace(**means, layers=torch.stack(layers).mean(0) if layers else None)


def _zero_gradient(state: MatchState) -> Gradient:
    zero = torch.zeros_like(state.log_lr)
    labels = torch.zeros_like(state.labels) if state.labels.is_floating_point() else None
    return Gradient(zero, torch.zeros_like(state.images), labels, zero, zero)


def match_trajectories(
    state: MatchState, problem: MatchProblem, check: Check, run: Run, progress: Progress = silent
) -> MatchState:
    """Learns the images and returns the state with the best accuracy on held-out training samples.

    check: returns the held-out accuracy of students trained on (images, labels, lr) at an iteration.
    Continues from the run's checkpoint if there is one. A resumed run ends with the same bytes: every draw depends only
    on the seed, the iteration and the trajectory, and a checkpoint holds everything that the next iteration needs.
    """
    config, device = problem.config, state.images.device
    previous, best, score, losses = None, state, -1.0, []
    file = run.path / "checkpoints" / "matching.safetensors"
    checkpoint = ranks.once(lambda: load_checkpoint(file, device, state) if file.exists() else None)
    if checkpoint:
        state, previous, best, score = checkpoint
    run.rewind("matching", state.iteration)
    last_save = time.monotonic()
    backend, compute = choose_gradient(state, problem)
    problem = with_resident_experts(problem, device)
    ahead: Attempt | None = None
    while state.iteration < config.iterations:
        attempt = ahead or launch_iteration(state, compute, problem)
        if backend.cache:  # by now everything is compiled; the next process starts warm
            backend = _save_compiled_code(backend)
        # The device works on the next iteration while the CPU reads this one. If this one has diverged, the next one is
        # thrown away, so the result is that of reading at once.
        goes_on = device.type in WORKS_AHEAD and not _is_checked(attempt.updated.iteration, config)
        ahead = launch_iteration(attempt.updated, compute, problem) if goes_on else None
        outcome = attempt.outcome(config)
        if outcome.diverged:
            state, previous, ahead = step_back(state, previous), None, None
            run.log("matching", state.iteration, loss=outcome.loss, undone=True, lr_img=state.lr_img)
        else:
            state, previous = attempt.updated, state
            layers = dict(zip(problem.net.layer_sizes, map(_rounded, outcome.layers), strict=False))
            run.log("matching", state.iteration, loss=outcome.loss, lr=outcome.lr, layers=layers)
        losses = [*losses[1 - MEAN_LOSSES :], outcome.loss]
        progress("matching", state.iteration, config.iterations, loss=sum(losses) / len(losses))
        if _is_checked(state.iteration, config):
            accuracy = check(state.average, state.labels, float(state.log_lr.exp()), state.iteration)
            run.log("matching", state.iteration, held_out=accuracy)
            if accuracy >= score:
                best, score = state, accuracy
            save_checkpoint(file, state, previous, best, score)
            last_save = time.monotonic()
        elif time.monotonic() - last_save > SAVE_EVERY:
            save_checkpoint(file, state, previous, best, score)
            last_save = time.monotonic()
    return best


def with_resident_experts(problem: MatchProblem, device: torch.device) -> MatchProblem:
    """Returns the problem with the snapshots that it can draw on a CUDA device, if they fit there."""
    config, experts = problem.config, problem.experts
    if not isinstance(experts, Experts):
        return problem
    return replace(
        problem, experts=experts.resident(device, range(config.min_start, config.max_start + config.expert_epochs + 1))
    )


def launch_iteration(state: MatchState, compute: TrajectoryGradient, problem: MatchProblem) -> Attempt:
    """Launches one iteration from `state`."""
    return Attempt.launch(state, mean_gradient(state, compute, problem), problem.config)


def _is_checked(iteration: int, config: MatchConfig) -> bool:
    return iteration % config.check_every == 0 or iteration == config.iterations


def _rounded(value: float) -> float:
    """Returns a value for the log, with four digits."""
    return float(f"{value:.4g}")


def _save_compiled_code(backend: StepBackend) -> StepBackend:
    """Returns the backend without its cache key, so that this happens once."""
    assert backend.cache
    save_compile_cache(backend.cache)
    return backend._replace(cache=None)
