"""The matching loop: learns synthetic images by the gradients of a base, and keeps the best ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from tadperf.compute import ranks
from tadperf.compute.compile import save_compile_cache
from tadperf.config import MatchConfig
from tadperf.experts.store import Experts
from tadperf.matching.attempt import Attempt
from tadperf.matching.base import Base, MatchProblem
from tadperf.matching.bases import BASES
from tadperf.matching.gradient import Gradient
from tadperf.matching.multi_formation import open_base
from tadperf.matching.state import MatchState, load_checkpoint, save_checkpoint, step_back
from tadperf.progress import Progress, silent
from tadperf.run.folder import Run

SAVE_EVERY = 10.0  # seconds between checkpoints, not tuned; the moment of a checkpoint changes no result
MEAN_LOSSES = 20  # iterations whose mean loss is reported, not tuned
WORKS_AHEAD = ("cuda",)  # devices that compute while the CPU does something else

Check = Callable[[Tensor, Tensor, float, int], float]  # images, labels, lr, iteration -> accuracy on held-out samples


def mean_gradient(state: MatchState, base: Base, trajectories: int) -> Gradient:
    """Returns the mean gradient over the draws (trajectories) of this iteration, which the ranks divide (tadperf).

    A rank without a draw adds zeros. `end` is that of a draw of this rank, and `layers` are the means over its draws.
    """
    numbers = range(ranks.rank(), trajectories, ranks.world_size())
    parts = base.gradients(state, numbers) or [_zero_gradient(state)]
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
    file, last_save = run.path / "checkpoints" / "matching.safetensors", time.monotonic()
    checkpoint = ranks.once(lambda: load_checkpoint(file, device, state) if file.exists() else None)
    if checkpoint:
        state, previous, best, score = checkpoint
    run.rewind("matching", state.iteration)
    base = open_base(problem.make_base or BASES[config.method], state, with_resident_experts(problem, device))
    first, ahead = state, None
    while state.iteration < config.iterations:
        attempt = ahead or launch_iteration(state, base, config)
        if base.cache and attempt.state is first:  # by now everything is compiled; the next process starts warm
            save_compile_cache(base.cache)
        # The device works on the next iteration while the CPU reads this one. If this one has diverged, the next one is
        # thrown away, so the result is that of reading at once.
        goes_on = device.type in WORKS_AHEAD and not _is_checked(attempt.updated.iteration, config)
        ahead = launch_iteration(attempt.updated, base, config) if goes_on else None
        outcome = attempt.outcome(config, base.exploded)
        if outcome.diverged:
            # Without an earlier state, `step_back` blames the students' learning rate, if the base learns it.
            state, previous, ahead = step_back(state, previous if base.learns_lr else previous or state), None, None
            run.log("matching", state.iteration, loss=outcome.loss, undone=True, lr_img=state.lr_img)
        else:
            state, previous = attempt.updated, state
            layers = dict(zip(base.layers, map(_rounded, outcome.layers), strict=False))
            run.log("matching", state.iteration, loss=outcome.loss, lr=outcome.lr, layers=layers)
        losses = [*losses[1 - MEAN_LOSSES :], outcome.loss]
        progress("matching", state.iteration, config.iterations, loss=sum(losses) / len(losses))
        if checked := _is_checked(state.iteration, config):
            accuracy = check(state.average, state.labels, float(state.log_lr.exp()), state.iteration)
            run.log("matching", state.iteration, held_out=accuracy)
            if accuracy >= score:
                best, score = state, accuracy
        if checked or time.monotonic() - last_save > SAVE_EVERY:
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


def launch_iteration(state: MatchState, base: Base, config: MatchConfig) -> Attempt:
    """Launches one iteration from `state`."""
    return Attempt.launch(state, mean_gradient(state, base, config.trajectories), config)


def _is_checked(iteration: int, config: MatchConfig) -> bool:
    return iteration % config.check_every == 0 or iteration == config.iterations


def _rounded(value: float) -> float:
    """Returns a value for the log, with four digits."""
    return float(f"{value:.4g}")
