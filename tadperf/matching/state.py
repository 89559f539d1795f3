"""The state of the matching loop: its update, its divergence guard and its checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tadperf import files
from tadperf.config import MatchConfig
from tadperf.errors import UserError
from tadperf.matching.gradient import Gradient

EXPLODED = 10.0  # a matching loss of at least this has diverged (at 1 the student did not move); not tuned
MAX_SLOPE = 1.0  # bound of dL / d log lr; not tuned


@dataclass(frozen=True)
class MatchState:
    """Everything that passes from one iteration to the next."""

    iteration: int
    images: Tensor  # [M, C, H, W], normalised
    labels: Tensor  # int64 [M], or logits [M, K]
    log_lr: Tensor  # scalar; learning the logarithm keeps the learning rate positive
    image_velocity: Tensor
    label_velocity: Tensor
    lr_velocity: Tensor
    average: Tensor  # moving average of the images, which is checked and kept; equals the images if match.ema is 0
    lr_img: float  # halved by the divergence guard

    def tensors(self) -> dict[str, Tensor]:
        """Returns all values as tensors by name, for a checkpoint."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)} | {
            "counters": torch.tensor([float(self.iteration), self.lr_img], dtype=torch.float64)
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> MatchState:
        """Returns the state that `tensors` describes."""
        iteration, lr_img = tensors["counters"].tolist()
        fields = {name: value.to(device) for name, value in tensors.items() if name != "counters"}
        return cls(int(iteration), lr_img=lr_img, **fields)


def initial_state(images: Tensor, labels: Tensor, config: MatchConfig) -> MatchState:
    """Returns the state before the first iteration. labels: int64 [M], or logits [M, K]."""
    label_velocity = torch.zeros_like(labels, dtype=images.dtype) if labels.is_floating_point() else labels.new_zeros(0)
    log_lr = torch.tensor(math.log(config.lr_init), dtype=images.dtype, device=images.device)
    return MatchState(
        0,
        images,
        labels,
        log_lr,
        torch.zeros_like(images),
        label_velocity,
        torch.zeros_like(log_lr),
        images,
        config.lr_img,
    )


def apply_gradient(state: MatchState, gradient: Gradient, config: MatchConfig) -> MatchState:
    """Takes one step of SGD with momentum on images, labels and log lr, and updates the images' average (FTD)."""
    image_velocity = config.momentum * state.image_velocity + gradient.images
    images = state.images - state.lr_img * image_velocity
    labels, label_velocity = state.labels, state.label_velocity
    if gradient.labels is not None:
        momentum = config.momentum if config.momentum_label is None else config.momentum_label
        label_velocity = momentum * label_velocity + gradient.labels
        labels = labels - config.lr_label * label_velocity
    # dL / d log lr = lr dL / d lr. Without the bound one bad trajectory moves the rate by orders of magnitude.
    slope = (gradient.lr * state.log_lr.exp()).clamp(-MAX_SLOPE, MAX_SLOPE)
    lr_velocity = config.momentum * state.lr_velocity + slope
    return replace(
        state,
        iteration=state.iteration + 1,
        images=images,
        labels=labels,
        log_lr=state.log_lr - config.lr_lr * lr_velocity,
        image_velocity=image_velocity,
        label_velocity=label_velocity,
        lr_velocity=lr_velocity,
        average=images.lerp(state.average, config.ema) if config.ema else images,
    )


def step_back(state: MatchState, previous: MatchState | None) -> MatchState:
    """The divergence guard: undoes the last update, sets all velocities to zero and halves the image learning rate.

    previous: the state before the last update. If it is None, the student's learning rate was too high and is halved.
    """
    restart = previous or replace(state, log_lr=state.log_lr - math.log(2))
    names = ("image_velocity", "label_velocity", "lr_velocity")
    velocities = {name: torch.zeros_like(getattr(restart, name)) for name in names}
    return replace(restart, iteration=state.iteration + 1, lr_img=state.lr_img / 2, **velocities)


def save_checkpoint(path: Path, state: MatchState, previous: MatchState | None, best: MatchState, score: float) -> None:
    """Writes a checkpoint. best: the state with the best held-out accuracy, `score`."""
    parts = {"state": state, "best": best} | ({"previous": previous} if previous else {})
    tensors = {f"{part}.{name}": value.clone() for part, s in parts.items() for name, value in s.tensors().items()}
    files.save_tensors(path, tensors, {"score": repr(score)})


def load_checkpoint(
    path: Path, device: torch.device, like: MatchState | None = None
) -> tuple[MatchState, MatchState | None, MatchState, float]:
    """Reads what `save_checkpoint` wrote: state, previous, best, score.

    like: a state whose shapes and dtypes the file must have. Raises UserError if the file is damaged or does not fit.
    """
    try:
        tensors, metadata = files.load_tensors(path)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            part, field = name.split(".", 1)
            parts.setdefault(part, {})[field] = value
        states = {part: MatchState.from_tensors(fields, device) for part, fields in parts.items()}
        if like is not None and any(_kinds(state) != _kinds(like) for state in states.values()):
            raise ValueError("other shapes or types")
        return states["state"], states.get("previous"), states["best"], float(metadata["score"])
    except (KeyError, TypeError, ValueError):  # a UserError of load_tensors is a ValueError
        remedy = "is damaged, or belongs to another run; delete it, then use --resume: matching starts again"
        raise UserError("--resume", path, remedy) from None


def _kinds(state: MatchState) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in state.tensors().items()}
