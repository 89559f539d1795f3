"""The distillation loop: synthetic images whose training trajectory imitates that of experts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from tadperf import accelerate, ranks, runs, seeds
from tadperf.config import MatchConfig
from tadperf.data import augment
from tadperf.experts.store import Experts
from tadperf.matching import bases, replay, ways
from tadperf.matching.gradient import GRADIENTS, Gradient, Step
from tadperf.matching.ways import Way
from tadperf.nets import FlatNet
from tadperf.progress import Progress, silent
from tadperf.runs import Run

EXPLODED = 10.0  # matching loss (1 is a student that stood still) at which a step counts as diverged
SAVE_EVERY = 10.0  # seconds between checkpoints; when they are taken changes no result

Check = Callable[[Tensor, Tensor, float, int], float]  # images, labels, lr, iteration -> accuracy on held-out samples


@dataclass(frozen=True)
class State:
    """Everything that the loop carries from one iteration to the next; values in, values out."""

    iteration: int
    images: Tensor  # [M, C, H, W], normalised
    labels: Tensor  # int64 [M], or logits [M, K]
    log_lr: Tensor  # scalar; the logarithm is learned, so that the rate cannot turn negative
    image_velocity: Tensor
    label_velocity: Tensor
    lr_velocity: Tensor
    average: Tensor  # moving average of the images, which is checked and kept; without one the images themselves
    lr_img: float  # halved by the divergence guard

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)} | {
            "counters": torch.tensor([float(self.iteration), self.lr_img], dtype=torch.float64)
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> State:
        iteration, lr_img = tensors["counters"].tolist()
        fields = {name: value.to(device) for name, value in tensors.items() if name != "counters"}
        return cls(int(iteration), lr_img=lr_img, **fields)


def begin(images: Tensor, labels: Tensor, config: MatchConfig) -> State:
    """The state before the first iteration."""
    label_velocity = torch.zeros_like(labels, dtype=images.dtype) if labels.is_floating_point() else labels.new_zeros(0)
    log_lr = torch.tensor(math.log(config.lr_init), dtype=images.dtype, device=images.device)
    return State(
        0, images, labels, log_lr, torch.zeros_like(images), label_velocity, torch.zeros_like(log_lr), images,
        config.lr_img,
    )  # fmt: skip


def draw_steps(config: MatchConfig, count: int, size: int, strategy: str, generator: torch.Generator) -> list[Step]:
    """T inner steps: mini-batches from shuffled passes over the synthetic set, each under its own augmentation."""
    batch = min(config.batch or count, count)
    passes = -(-config.steps * batch // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    drawn = augment.draw(strategy, config.steps * batch, size, generator)
    return [Step(order[i : i + batch], drawn.rows(i, i + batch)) for i in range(0, config.steps * batch, batch)]


def update(state: State, gradient: Gradient, config: MatchConfig) -> State:
    """One step of SGD with momentum on images, labels and log lr, and of the images' average (FTD)."""
    image_velocity = config.momentum * state.image_velocity + gradient.images
    images = state.images - state.lr_img * image_velocity
    labels, label_velocity = state.labels, state.label_velocity
    if gradient.labels is not None:
        momentum = config.momentum if config.momentum_label is None else config.momentum_label
        label_velocity = momentum * label_velocity + gradient.labels
        labels = labels - config.lr_label * label_velocity
    # d/d log lr = lr d/d lr; clamped, since one bad trajectory would otherwise move the rate by orders of magnitude.
    slope = (gradient.lr * state.log_lr.exp()).clamp(-1, 1)
    lr_velocity = config.momentum * state.lr_velocity + slope
    return replace(
        state, iteration=state.iteration + 1, images=images, labels=labels,
        log_lr=state.log_lr - config.lr_lr * lr_velocity, image_velocity=image_velocity, label_velocity=label_velocity,
        lr_velocity=lr_velocity, average=images.lerp(state.average, config.ema) if config.ema else images,
    )  # fmt: skip


def diverged(gradient: Gradient, following: State) -> bool:
    """Whether a step must not be taken: a loss that exploded, or a value in it or after it that is not finite."""
    values = [gradient.loss, gradient.images, gradient.lr, following.images, following.labels, following.log_lr]
    return not (float(gradient.loss) < EXPLODED and all(bool(v.isfinite().all()) for v in values))


def undo(state: State, previous: State | None) -> State:
    """The divergence guard: back to before the last update, at rest, with half the image learning rate.

    Where there is nothing to go back to, the student's own rate was too high: that is halved.
    """
    calm = previous or replace(state, log_lr=state.log_lr - math.log(2))
    rest = {name: torch.zeros_like(getattr(calm, name)) for name in ("image_velocity", "label_velocity", "lr_velocity")}
    return replace(calm, iteration=state.iteration + 1, lr_img=state.lr_img / 2, **rest)


def matching_gradient(
    state: State, compute: Callable[..., Gradient], experts: Experts, config: MatchConfig, strategy: str, seed: int,
    k: int = 0,
) -> Gradient:  # fmt: skip
    """Draws the k-th expert, start and inner steps of this iteration, and differentiates the matching loss."""
    generator = seeds.generator(seed, "match", state.iteration, *([k] if k else []))
    expert = int(torch.randint(len(experts), (), generator=generator))
    first, last = bases.start_range(config, state.iteration)
    start = int(torch.randint(first, last + 1, (), generator=generator))
    device = state.images.device
    drawn = draw_steps(config, len(state.images), state.images.shape[-1], strategy, generator)
    steps = [step._replace(index=step.index.to(device)) for step in drawn]
    ends = (experts.snapshot(expert, epoch).to(device) for epoch in (start, start + config.expert_epochs))
    return compute(*ends, state.images, state.labels, state.log_lr.exp(), steps)


def choose_way(state: State, net: FlatNet, config: MatchConfig) -> tuple[Way, Callable[..., Gradient]]:
    """How this run computes an inner step (`ways.choose`), and a sweep of them: (start, target, ...) to `Gradient`."""
    batch = min(config.batch or len(state.images), len(state.images))
    shape, device = (batch, *state.images.shape[1:]), state.images.device
    way = ways.choose(config, net, shape, device, config.iterations - state.iteration)
    if device.type == "cuda" and config.compile != "off" and config.gradient != "unroll":
        return way, replay.Sweep(net, way, config.gradient == "adjoint")
    return way, partial(GRADIENTS[config.gradient], net, way=way)


def mean_gradient(
    state: State, compute: Callable[..., Gradient], experts: Experts, config: MatchConfig, strategy: str, seed: int
) -> Gradient:
    """The mean over this iteration's trajectories, which the ranks divide among them (tadperf).

    A rank without a trajectory, where there are fewer of them than ranks, adds zeros. `end` is that of an own one.
    """
    own = range(ranks.rank(), config.trajectories, ranks.world())
    parts = [matching_gradient(state, compute, experts, config, strategy, seed, k) for k in own] or [_nothing(state)]
    if config.trajectories == ranks.world() == 1:
        return parts[0]
    names = [name for name in ("loss", "images", "labels", "lr") if getattr(parts[0], name) is not None]
    sums = [reduce(torch.add, [getattr(part, name) for part in parts]) for name in names]
    return parts[0]._replace(**dict(zip(names, ranks.mean(sums, config.trajectories), strict=True)))


def _nothing(state: State) -> Gradient:
    zero = torch.zeros_like(state.log_lr)
    labels = torch.zeros_like(state.labels) if state.labels.is_floating_point() else None
    return Gradient(zero, torch.zeros_like(state.images), labels, zero, zero)


def distil(
    state: State, net: FlatNet, experts: Experts, config: MatchConfig, strategy: str, seed: int, check: Check, run: Run,
    progress: Progress = silent,
) -> State:  # fmt: skip
    """Learns the images; returns the state that did best on held-out training samples.

    check: trains students on (images, labels, lr) and gives their accuracy on held-out samples.
    Continues from the run's checkpoint where there is one. Every draw depends on (seed, iteration)
    alone and a checkpoint holds all that is carried on, so a resumed run ends in the same bytes.
    """
    previous, best, score, losses = None, state, -1.0, []
    saved = run.path / "checkpoints" / "matching.safetensors"
    if kept := ranks.once(lambda: _load(saved, state.images.device) if saved.exists() else None):
        state, previous, best, score = kept
    run.rewind("matching", state.iteration)
    last_save = time.monotonic()
    way, compute = choose_way(state, net, config)
    while state.iteration < config.iterations:
        gradient = mean_gradient(state, compute, experts, config, strategy, seed)
        if way.cache:  # all of it has been compiled: the next process starts warm
            way = _kept(way)
        loss = float(gradient.loss)
        following = update(state, gradient, config)
        if diverged(gradient, following):
            state, previous = undo(state, previous), None
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
            _save(saved, state, previous, best, score)
            last_save = time.monotonic()
        elif time.monotonic() - last_save > SAVE_EVERY:
            _save(saved, state, previous, best, score)
            last_save = time.monotonic()
    return best


def _kept(way: Way) -> Way:
    assert way.cache
    accelerate.save_caches(way.cache)
    return way._replace(cache=None)


def _save(path: Path, state: State, previous: State | None, best: State, score: float) -> None:
    parts = {"state": state, "best": best} | ({"previous": previous} if previous else {})
    tensors = {f"{part}.{name}": value.clone() for part, s in parts.items() for name, value in s.tensors().items()}
    runs.save_tensors(path, tensors, {"score": repr(score)})


def _load(path: Path, device: torch.device) -> tuple[State, State | None, State, float]:
    tensors, metadata = runs.load_tensors(path)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        part, field = name.split(".", 1)
        parts.setdefault(part, {})[field] = value
    states = {part: State.from_tensors(fields, device) for part, fields in parts.items()}
    return states["state"], states.get("previous"), states["best"], float(metadata["score"])


def soft_labels(net: FlatNet, experts: Experts, images: Tensor, epoch: int, right: Tensor | None = None) -> Tensor:
    """Label logits [M, K] to start from: the mean of the experts' logits after `epoch` epochs (tadperf).

    right: the images' classes, int64 [M]; with them only experts that classify an image rightly have a say in it, where
    there is one (DATM).
    """
    with torch.no_grad():
        logits = torch.stack([net(experts.snapshot(e, epoch).to(images), images) for e in range(len(experts))])
    if right is None:
        return logits.mean(0)
    says = logits.argmax(2) == right.to(logits.device)
    says |= ~says.any(0)
    return (logits * says[:, :, None]).sum(0) / says.sum(0)[:, None]
