"""The matching loop: learns synthetic images whose training trajectory imitates the experts' trajectories."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.compute import ranks
from tadperf.compute.compile import save_compile_cache
from tadperf.config import MatchConfig
from tadperf.data import augment
from tadperf.errors import UserError
from tadperf.experts.store import Experts
from tadperf.matching.cuda_graph_sweep import GraphedSweep
from tadperf.matching.gradient import GRADIENTS, Gradient, Step
from tadperf.matching.starts import start_range
from tadperf.matching.state import MatchState, apply_gradient, has_diverged, load_checkpoint, save_checkpoint, step_back
from tadperf.matching.step_backends import StepBackend, choose_step_backend
from tadperf.nets.flat import FlatNet
from tadperf.progress import Progress, silent
from tadperf.run.folder import Run

SAVE_EVERY = 10.0  # seconds between checkpoints, not tuned; the moment of a checkpoint changes no result
MEAN_LOSSES = 20  # iterations whose mean loss is reported, not tuned

Check = Callable[[Tensor, Tensor, float, int], float]  # images, labels, lr, iteration -> accuracy on held-out samples
# (start, target, images, labels, lr, steps) -> Gradient
TrajectoryGradient = Callable[..., Gradient]


@dataclass(frozen=True)
class MatchProblem:
    """The constant inputs of the matching loop.

    net: the network of experts and students. augment: the strategy of data.augment. seed: all draws derive from it.
    """

    net: FlatNet
    experts: Experts
    config: MatchConfig
    augment: str
    seed: int


def draw_steps(config: MatchConfig, count: int, size: int, strategy: str, generator: torch.Generator) -> list[Step]:
    """Draws T inner steps: batches from shuffled passes over `count` images of `size` pixels, with augmentations."""
    batch = min(config.batch or count, count)
    passes = -(-config.steps * batch // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    drawn = augment.draw(strategy, config.steps * batch, size, generator)
    return [Step(order[i : i + batch], drawn.rows(i, i + batch)) for i in range(0, config.steps * batch, batch)]


def matching_gradient(
    state: MatchState, compute: TrajectoryGradient, problem: MatchProblem, trajectory: int = 0
) -> Gradient:
    """Draws an expert, its start epoch and the inner steps, and computes the gradient of the matching loss.

    trajectory: its number in this iteration, from 0 to match.trajectories - 1.
    """
    config, experts = problem.config, problem.experts
    generator = seeds.generator(problem.seed, "match", state.iteration, *([trajectory] if trajectory else []))
    expert = int(torch.randint(len(experts), (), generator=generator))
    first, last = start_range(config, state.iteration)
    start = int(torch.randint(first, last + 1, (), generator=generator))
    device = state.images.device
    drawn = draw_steps(config, len(state.images), state.images.shape[-1], problem.augment, generator)
    steps = [step._replace(rows=step.rows.to(device)) for step in drawn]
    ends = (experts.snapshot(expert, epoch).to(device) for epoch in (start, start + config.expert_epochs))
    return compute(*ends, state.images, state.labels, state.log_lr.exp(), steps)


def choose_gradient(state: MatchState, problem: MatchProblem) -> tuple[StepBackend, TrajectoryGradient]:
    """Chooses how this run computes an inner step, and the gradient of a trajectory."""
    config, net = problem.config, problem.net
    batch = min(config.batch or len(state.images), len(state.images))
    shape, device = (batch, *state.images.shape[1:]), state.images.device
    # Passes all iterations of the run, not only those left: a resumed run must choose the same backend.
    backend = choose_step_backend(config, net, shape, device, config.iterations)
    if device.type == "cuda" and config.compile != "off" and config.gradient != "unroll":
        return backend, GraphedSweep(net, backend, config.gradient == "adjoint")
    return backend, partial(GRADIENTS[config.gradient], net, backend=backend)


def mean_gradient(state: MatchState, compute: TrajectoryGradient, problem: MatchProblem) -> Gradient:
    """Returns the mean gradient over the trajectories of this iteration, which the ranks divide (tadperf).

    A rank without a trajectory adds zeros. `end` is that of a trajectory of this rank.
    """
    trajectories = problem.config.trajectories
    numbers = range(ranks.rank(), trajectories, ranks.world_size())
    parts = [matching_gradient(state, compute, problem, number) for number in numbers] or [_zero_gradient(state)]
    if trajectories == ranks.world_size() == 1:
        return parts[0]
    names = [name for name in ("loss", "images", "labels", "lr") if getattr(parts[0], name) is not None]
    sums = [reduce(torch.add, [getattr(part, name) for part in parts]) for name in names]
    return parts[0]._replace(**dict(zip(names, ranks.mean(sums, trajectories), strict=True)))


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
    config = problem.config
    previous, best, score, losses = None, state, -1.0, []
    file = run.path / "checkpoints" / "matching.safetensors"
    checkpoint = ranks.once(lambda: load_checkpoint(file, state.images.device, state) if file.exists() else None)
    if checkpoint:
        state, previous, best, score = checkpoint
    run.rewind("matching", state.iteration)
    last_save = time.monotonic()
    backend, compute = choose_gradient(state, problem)
    while state.iteration < config.iterations:
        gradient = mean_gradient(state, compute, problem)
        if backend.cache:  # by now everything is compiled; the next process starts warm
            backend = _save_compiled_code(backend)
        loss = float(gradient.loss)
        updated = apply_gradient(state, gradient, config)
        _check_learned_rate(updated, config)
        if has_diverged(gradient, updated):
            state, previous = step_back(state, previous), None
            run.log("matching", state.iteration, loss=loss, undone=True, lr_img=state.lr_img)
        else:
            state, previous = updated, state
            run.log("matching", state.iteration, loss=loss, lr=float(state.log_lr.exp()))
        losses = [*losses[1 - MEAN_LOSSES :], loss]
        progress("matching", state.iteration, config.iterations, loss=sum(losses) / len(losses))
        if state.iteration % config.check_every == 0 or state.iteration == config.iterations:
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


def _check_learned_rate(state: MatchState, config: MatchConfig) -> None:
    """Raises UserError if the learned learning rate has become 0 or infinite, although its logarithm is finite."""
    lr = float(state.log_lr.exp())
    if state.log_lr.isfinite() and not 0 < lr < math.inf:
        remedy = f"too large: it drove the students' learning rate to {lr} at iteration {state.iteration}"
        raise UserError("match.lr_lr", config.lr_lr, f"{remedy}; use a smaller value, such as 0.05")


def _save_compiled_code(backend: StepBackend) -> StepBackend:
    """Returns the backend without its cache key, so that this happens once."""
    assert backend.cache
    save_compile_cache(backend.cache)
    return backend._replace(cache=None)
