"""The distillation loop: synthetic images whose training trajectory imitates that of experts."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial, reduce

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.compute import ranks
from tadperf.compute.compile import save_compile_cache
from tadperf.config import MatchConfig
from tadperf.data import augment
from tadperf.experts.store import Experts
from tadperf.matching import cuda_graph_sweep, step_backends
from tadperf.matching.gradient import GRADIENTS, Gradient, Step
from tadperf.matching.starts import start_range
from tadperf.matching.state import MatchState, apply_gradient, has_diverged, load_checkpoint, save_checkpoint, step_back
from tadperf.matching.step_backends import StepBackend
from tadperf.nets.flat import FlatNet
from tadperf.progress import Progress, silent
from tadperf.run.folder import Run

SAVE_EVERY = 10.0  # seconds between checkpoints; when they are taken changes no result

Check = Callable[[Tensor, Tensor, float, int], float]  # images, labels, lr, iteration -> accuracy on held-out samples


def draw_steps(config: MatchConfig, count: int, size: int, strategy: str, generator: torch.Generator) -> list[Step]:
    """T inner steps: mini-batches from shuffled passes over the synthetic set, each under its own augmentation."""
    batch = min(config.batch or count, count)
    passes = -(-config.steps * batch // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    drawn = augment.draw(strategy, config.steps * batch, size, generator)
    return [Step(order[i : i + batch], drawn.rows(i, i + batch)) for i in range(0, config.steps * batch, batch)]


def matching_gradient(
    state: MatchState,
    compute: Callable[..., Gradient],
    experts: Experts,
    config: MatchConfig,
    strategy: str,
    seed: int,
    k: int = 0,
) -> Gradient:
    """Draws the k-th expert, start and inner steps of this iteration, and differentiates the matching loss."""
    generator = seeds.generator(seed, "match", state.iteration, *([k] if k else []))
    expert = int(torch.randint(len(experts), (), generator=generator))
    first, last = start_range(config, state.iteration)
    start = int(torch.randint(first, last + 1, (), generator=generator))
    device = state.images.device
    drawn = draw_steps(config, len(state.images), state.images.shape[-1], strategy, generator)
    steps = [step._replace(index=step.index.to(device)) for step in drawn]
    ends = (experts.snapshot(expert, epoch).to(device) for epoch in (start, start + config.expert_epochs))
    return compute(*ends, state.images, state.labels, state.log_lr.exp(), steps)


def choose_sweep(state: MatchState, net: FlatNet, config: MatchConfig) -> tuple[StepBackend, Callable[..., Gradient]]:
    """How this run computes an inner step (`ways.choose`), and a sweep of them: (start, target, ...) to `Gradient`."""
    batch = min(config.batch or len(state.images), len(state.images))
    shape, device = (batch, *state.images.shape[1:]), state.images.device
    way = step_backends.choose_step_backend(config, net, shape, device, config.iterations - state.iteration)
    if device.type == "cuda" and config.compile != "off" and config.gradient != "unroll":
        return way, cuda_graph_sweep.GraphedSweep(net, way, config.gradient == "adjoint")
    return way, partial(GRADIENTS[config.gradient], net, way=way)


def mean_gradient(
    state: MatchState, compute: Callable[..., Gradient], experts: Experts, config: MatchConfig, strategy: str, seed: int
) -> Gradient:
    """The mean over this iteration's trajectories, which the ranks divide among them (tadperf).

    A rank without a trajectory, where there are fewer of them than ranks, adds zeros. `end` is that of an own one.
    """
    own = range(ranks.rank(), config.trajectories, ranks.world_size())
    parts = [matching_gradient(state, compute, experts, config, strategy, seed, k) for k in own] or [
        _zero_gradient(state)
    ]
    if config.trajectories == ranks.world_size() == 1:
        return parts[0]
    names = [name for name in ("loss", "images", "labels", "lr") if getattr(parts[0], name) is not None]
    sums = [reduce(torch.add, [getattr(part, name) for part in parts]) for name in names]
    return parts[0]._replace(**dict(zip(names, ranks.mean(sums, config.trajectories), strict=True)))


def _zero_gradient(state: MatchState) -> Gradient:
    zero = torch.zeros_like(state.log_lr)
    labels = torch.zeros_like(state.labels) if state.labels.is_floating_point() else None
    return Gradient(zero, torch.zeros_like(state.images), labels, zero, zero)


def match_trajectories(
    state: MatchState,
    net: FlatNet,
    experts: Experts,
    config: MatchConfig,
    strategy: str,
    seed: int,
    check: Check,
    run: Run,
    progress: Progress = silent,
) -> MatchState:
    """Learns the images; returns the state that did best on held-out training samples.

    check: trains students on (images, labels, lr) and gives their accuracy on held-out samples.
    Continues from the run's checkpoint where there is one. Every draw depends on (seed, iteration)
    alone and a checkpoint holds all that is carried on, so a resumed run ends in the same bytes.
    """
    previous, best, score, losses = None, state, -1.0, []
    saved = run.path / "checkpoints" / "matching.safetensors"
    if kept := ranks.once(lambda: load_checkpoint(saved, state.images.device) if saved.exists() else None):
        state, previous, best, score = kept
    run.rewind("matching", state.iteration)
    last_save = time.monotonic()
    way, compute = choose_sweep(state, net, config)
    while state.iteration < config.iterations:
        gradient = mean_gradient(state, compute, experts, config, strategy, seed)
        if way.cache:  # all of it has been compiled: the next process starts warm
            way = _save_compiled_code(way)
        loss = float(gradient.loss)
        following = apply_gradient(state, gradient, config)
        if has_diverged(gradient, following):
            state, previous = step_back(state, previous), None
            run.log("matching", state.iteration, loss=loss, undone=True, lr_img=state.lr_img)
        else:
            state, previous = following, state
            run.log("matching", state.iteration, loss=loss, lr=float(state.log_lr.exp()))
        losses = [*losses[-19:], loss]
        progress("matching", state.iteration, config.iterations, loss=sum(losses) / len(losses))
        if state.iteration % config.check_every == 0 or state.iteration == config.iterations:
            accuracy = check(state.average, state.labels, float(state.log_lr.exp()), state.iteration)
            run.log("matching", state.iteration, held_out=accuracy)
            if accuracy >= score:
                best, score = state, accuracy
            save_checkpoint(saved, state, previous, best, score)
            last_save = time.monotonic()
        elif time.monotonic() - last_save > SAVE_EVERY:
            save_checkpoint(saved, state, previous, best, score)
            last_save = time.monotonic()
    return best


def _save_compiled_code(way: StepBackend) -> StepBackend:
    assert way.cache
    save_compile_cache(way.cache)
    return way._replace(cache=None)
