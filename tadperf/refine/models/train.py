"""Trains the class-conditional UNet on the trusted samples; works offline and on any images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf import files, seeds
from tadperf.config import DiffusionConfig
from tadperf.errors import UserError
from tadperf.progress import Progress, silent
from tadperf.refine.models import sampling, unet
from tadperf.refine.models.base import Target
from tadperf.run.folder import Run

SAVE_EVERY = 30.0  # seconds between checkpoints; does not change the result
WARMUP = 100  # steps until the peak learning rate; not tuned
BETAS = (0.9, 0.99)  # of AdamW; not tuned
CLIP = 1.0  # largest norm of a gradient; not tuned


class PixelSamples(NamedTuple):
    """The images to learn. pixels: returns uint8 images by index int64 [B]. labels: int64 [N]. weights: float32 [N].

    The weight is the reliability of the label. diffusion.weighting says how it is used.
    """

    pixels: Callable[[Tensor], Tensor]
    labels: Tensor
    weights: Tensor | None


class Training(NamedTuple):
    """The state of training."""

    model: Any
    optimiser: torch.optim.AdamW
    average: Any  # diffusers' EMAModel


def train_diffusion_model(
    folder: Path,
    samples: PixelSamples,
    target: Target,
    config: DiffusionConfig,
    seed: int,
    run: Run,
    progress: Progress = silent,
) -> None:
    """Trains a UNet and saves it in `folder` in diffusers' format. Does nothing if `folder` exists.

    Continues from the run's checkpoint if there is one. Every draw depends on (seed, step) only, and a checkpoint holds
    the whole state, so a resumed training ends with the same bytes.
    """
    saved = run.path / "checkpoints" / "diffusion.safetensors"
    if folder.exists():
        saved.unlink(missing_ok=True)
        return
    noising, sampler = unet.schedulers()
    state, first = initial_training(target, config, seed), 0
    if saved.exists():
        first = load_checkpoint(saved, state)
    run.rewind("diffusion", first)
    step = partial(train_step, state, noising, samples, target, config, seed)
    last_save, losses = time.monotonic(), []
    for number in range(first, config.iterations):
        loss = step(number)
        losses = [*losses[-49:], loss]
        run.log("diffusion", number + 1, loss=loss)
        progress("diffusion", number + 1, config.iterations, loss=sum(losses) / len(losses))
        if time.monotonic() - last_save > SAVE_EVERY:
            save_checkpoint(saved, state, number + 1)
            last_save = time.monotonic()
    state.average.copy_to(state.model.parameters())
    unet.save(folder, state.model.eval(), sampler)
    saved.unlink(missing_ok=True)


def initial_training(target: Target, config: DiffusionConfig, seed: int) -> Training:
    """Returns the state before the first step."""
    from diffusers.training_utils import EMAModel

    model = unet.build(config, target.shape, len(target.class_names), seeds.derive(seed, "unet")).to(target.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=BETAS, weight_decay=0.0)
    return Training(model.train(), optimiser, EMAModel(model.parameters(), config.ema, foreach=True))


def learning_rate(config: DiffusionConfig, step: int) -> float:
    """Returns the learning rate of a step: a linear warm-up times half a cosine that ends near 0."""
    warm = min(1.0, (step + 1) / min(WARMUP, config.iterations))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.iterations))


def train_step(
    state: Training,
    noising: Any,
    samples: PixelSamples,
    target: Target,
    config: DiffusionConfig,
    seed: int,
    step: int,
) -> float:
    """Takes one step of AdamW on the loss of the predicted velocity (Salimans and Ho, 2022); returns the loss.

    With diffusion.weighting = "draws", samples are drawn in proportion to their weights. With "loss", all are drawn
    equally often and the weight multiplies the loss, except where the label is dropped: then a wrong label does no harm
    (tadperf).
    """
    labels, weights = samples.labels, samples.weights
    weights = torch.ones(len(labels)) if weights is None else weights.float().cpu()
    shares = weights if config.weighting == "draws" else torch.ones(len(labels))
    generator = seeds.generator(seed, "diffusion", step)
    index = torch.multinomial(shares, config.batch, replacement=True, generator=generator)
    timestep = torch.randint(noising.config.num_train_timesteps, (config.batch,), generator=generator)
    without_label = torch.rand(config.batch, generator=generator) < config.drop
    channels, height, _ = target.shape
    x = sampling.to_range(samples.pixels(index).to(target.device), channels, height)
    x = unet.pad(x, state.model.config.sample_size)
    noise = torch.randn(x.shape, generator=generator).to(x)
    null = len(target.class_names)
    label = labels[index.to(labels.device)].to("cpu").masked_fill(without_label, null).to(x.device)
    timestep = timestep.to(x.device)
    prediction = state.model(noising.add_noise(x, noise, timestep), timestep, label).sample
    velocity = noising.get_velocity(x, noise, timestep)
    if config.weighting == "draws" or samples.weights is None:
        loss = F.mse_loss(prediction, velocity)
    else:
        weight = weights[index].masked_fill(without_label, 1).to(x.device)
        loss = (F.mse_loss(prediction, velocity, reduction="none").flatten(1).mean(1) * weight).mean()
    state.optimiser.param_groups[0]["lr"] = learning_rate(config, step)
    state.optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), CLIP)
    state.optimiser.step()
    state.average.step(state.model.parameters())
    return loss.item()


def save_checkpoint(path: Path, state: Training, step: int) -> None:
    """Writes the weights, their average and the optimiser's moments after `step` steps."""
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
def load_checkpoint(path: Path, state: Training) -> int:
    """Restores what `save_checkpoint` wrote into `state`; returns the number of finished steps.

    Raises UserError if the file is damaged or belongs to another model.
    """
    tensors, metadata = files.load_tensors(path)
    try:
        step = int(metadata["step"])
        for i, parameter in enumerate(state.model.parameters()):
            parameter.copy_(tensors[f"weight.{i}"])
            state.average.shadow_params[i].copy_(tensors[f"average.{i}"])
            first, second = (tensors[f"{name}.{i}"].to(parameter.device) for name in ("first", "second"))
            assert first.shape == second.shape == parameter.shape
            state.optimiser.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": first,
                "exp_avg_sq": second,
            }
    except (KeyError, ValueError, RuntimeError, AssertionError) as error:
        remedy = f"is not a checkpoint of this diffusion model ({error}); delete it and resume: training starts again"
        raise UserError("diffusion", path, remedy) from None
    state.average.optimization_step = step
    return step
