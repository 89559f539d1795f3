"""Training the class-conditional UNet on the trusted samples: it works offline, on any data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf import files, seeds
from tadperf.config import DiffusionConfig
from tadperf.progress import Progress, silent
from tadperf.refine.models import sampling, unet
from tadperf.refine.models.base import Target
from tadperf.run.folder import Run

SAVE_EVERY = 30.0  # seconds between checkpoints; when they are taken changes no result
WARMUP = 100  # steps until the peak learning rate
BETAS, CLIP = (0.9, 0.99), 1.0


class Training(NamedTuple):
    """What training carries from step to step."""

    model: Any
    optimiser: torch.optim.AdamW
    average: Any  # diffusers' EMAModel


def train_diffusion_model(
    folder: Path,
    pixels: Callable[[Tensor], Tensor],
    labels: Tensor,
    weights: Tensor | None,
    target: Target,
    config: DiffusionConfig,
    seed: int,
    run: Run,
    progress: Progress = silent,
) -> None:
    """Trains a UNet on images of uint8 by index, labels int64 [N], and saves it in `folder` in diffusers' format.

    weights: float [N], reliability: a sample is drawn in proportion to it. Goes on from the run's checkpoint where
    there is one, and does nothing where `folder` is there. Every draw depends on (seed, step) alone and a checkpoint
    holds all that is carried on, so a resumed training ends in the same bytes.
    """
    saved = run.path / "checkpoints" / "diffusion.safetensors"
    if folder.exists():
        saved.unlink(missing_ok=True)
        return
    noising, sampler = unet.schedulers()
    state, first = begin(target, config, seed), 0
    if saved.exists():
        first = restore(saved, state)
    run.rewind("diffusion", first)
    shares = torch.ones(len(labels)) if weights is None else weights.float().cpu()
    last_save, losses = time.monotonic(), []
    for step in range(first, config.iterations):
        loss = one_step(state, noising, pixels, labels, shares, target, config, step, seed)
        losses = [*losses[-49:], loss]
        run.log("diffusion", step + 1, loss=loss)
        progress("diffusion", step + 1, config.iterations, loss=sum(losses) / len(losses))
        if time.monotonic() - last_save > SAVE_EVERY:
            keep(saved, state, step + 1)
            last_save = time.monotonic()
    state.average.copy_to(state.model.parameters())
    unet.save(folder, state.model.eval(), sampler)
    saved.unlink(missing_ok=True)


def begin(target: Target, config: DiffusionConfig, seed: int) -> Training:
    """The state before the first step."""
    from diffusers.training_utils import EMAModel

    model = unet.build(config, target.shape, len(target.class_names), seeds.derive(seed, "unet"))
    model = model.to(target.device)  # pyright: ignore[reportArgumentType]
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=BETAS, weight_decay=0.0)
    return Training(model.train(), optimiser, EMAModel(model.parameters(), config.ema, foreach=True))


def rate(config: DiffusionConfig, step: int) -> float:
    """The learning rate of a step: linear warm-up, then half a cosine down to 0 at the end."""
    warm = min(1.0, (step + 1) / min(WARMUP, config.iterations))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.iterations))


def one_step(
    state: Training,
    noising: Any,
    pixels: Callable[[Tensor], Tensor],
    labels: Tensor,
    shares: Tensor,
    target: Target,
    config: DiffusionConfig,
    step: int,
    seed: int,
) -> float:
    """One step of AdamW on the velocity that was mixed in (Salimans and Ho, 2022); returns the loss."""
    generator = seeds.generator(seed, "diffusion", step)
    index = torch.multinomial(shares, config.batch, replacement=True, generator=generator)
    timestep = torch.randint(noising.config.num_train_timesteps, (config.batch,), generator=generator)
    left_out = torch.rand(config.batch, generator=generator) < config.drop
    channels, height, _ = target.shape
    x = sampling.to_range(pixels(index).to(target.device), channels, height)
    x = unet.pad(x, state.model.config.sample_size)
    drawn = torch.randn(x.shape, generator=generator).to(x)
    label = labels[index.to(labels.device)].to("cpu").masked_fill(left_out, len(target.class_names)).to(x.device)
    timestep = timestep.to(x.device)
    said = state.model(noising.add_noise(x, drawn, timestep), timestep, label).sample
    loss = F.mse_loss(said, noising.get_velocity(x, drawn, timestep))
    state.optimiser.param_groups[0]["lr"] = rate(config, step)
    state.optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), CLIP)
    state.optimiser.step()
    state.average.step(state.model.parameters())
    return loss.item()


def keep(path: Path, state: Training, step: int) -> None:
    """Writes weights, their average and the optimiser's moments after `step` steps."""
    tensors: dict[str, Tensor] = {}
    for i, parameter in enumerate(state.model.parameters()):
        moments = state.optimiser.state[parameter]
        tensors |= {
            f"weight.{i}": parameter,
            f"average.{i}": state.average.shadow_params[i],
            f"first.{i}": moments["exp_avg"],
            f"second.{i}": moments["exp_avg_sq"],
        }
    files.save_tensors(path, tensors, {"step": str(step)})


@torch.no_grad()
def restore(path: Path, state: Training) -> int:
    """Puts what `keep` wrote into `state`; returns the steps done."""
    tensors, metadata = files.load_tensors(path)
    step = int(metadata["step"])
    for i, parameter in enumerate(state.model.parameters()):
        parameter.copy_(tensors[f"weight.{i}"])
        state.average.shadow_params[i].copy_(tensors[f"average.{i}"])
        first, second = (tensors[f"{name}.{i}"].to(parameter.device) for name in ("first", "second"))
        state.optimiser.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": first,
            "exp_avg_sq": second,
        }
    state.average.optimization_step = step
    return step
