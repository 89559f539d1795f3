"""Sampling that all models share: noise per image, denoising from a noised prototype, conversion of pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.config import RefineConfig
from tadperf.errors import UserError


def generators(image_seeds: Sequence[int]) -> list[torch.Generator]:
    """Returns one CPU generator per image, so that its noise depends on no other image and on no device."""
    return [torch.Generator().manual_seed(seed) for seed in image_seeds]


def image_noise(shape: Sequence[int], image_seeds: Sequence[int]) -> Tensor:
    """Returns standard normal noise float32 [B, *shape]; each image has its own seed."""
    return torch.stack([torch.randn(*shape, generator=g) for g in generators(image_seeds)])


def ddim(scheduler: Any) -> Any:
    """Returns the deterministic DDIM sampler (Song et al., 2021) with a scheduler's noise levels.

    Only the initial noise is random, so one seed gives one image.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(scheduler.config)


def denoise_from(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    start: Tensor,
    noise: Tensor,
    steps: int,
    strength: float,
) -> Tensor:
    """Adds noise to `start` [B, ...] up to the step that `strength` sets, and denoises it (diffusers' image-to-image).

    predict: returns the model's prediction for (noised [B, ...], timestep). noise: standard normal [B, ...].
    """
    scheduler.set_timesteps(steps, device=start.device)
    timesteps = scheduler.timesteps[steps - num_steps(steps, strength) :]
    x = scheduler.add_noise(start, noise, timesteps[:1].expand(len(start)))
    for timestep in timesteps:
        x = scheduler.step(predict(x, timestep), timestep, x).prev_sample
    return x


def num_steps(steps: int, strength: float) -> int:
    """Returns how many of `steps` denoising steps a strength uses, rounded down as in diffusers. Refuses 0."""
    count = min(int(steps * strength), steps)
    if count < 1:
        remedy = f"is less than one of refine.steps = {steps} steps; must be at least {1 / steps:.3g}"
        raise UserError("refine.strength", strength, remedy)
    return count


def denoiser_calls(config: RefineConfig) -> tuple[int, int]:
    """Returns the rows in a call of the denoiser, and its calls for a batch of first images (candidates need more)."""
    return config.batch * (2 if config.guidance > 1 else 1), num_steps(config.steps, config.strength)


def apply_guidance(predictions: Tensor, guidance: float) -> Tensor:
    """Applies classifier-free guidance (Ho and Salimans, 2022) to 2 B predictions: B with labels, then B without."""
    conditional, unconditional = predictions.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def to_range(images: Tensor, channels: int, side: int) -> Tensor:
    """Converts uint8 images [B, C, H, W] to float32 [B, channels, side, side] in [-1, 1], grey if channels differ."""
    x = images.float().div(127.5).sub(1)
    if x.shape[1] != channels:
        x = x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    return x.contiguous()


def to_pixels(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Converts floats [B, c, h, w] in [-1, 1] to uint8 [B, *shape]: resizes or turns grey if needed, rounds, clamps."""
    channels, height, width = shape
    x = x.float()
    if x.shape[-2:] != (height, width):
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False)
    if x.shape[1] != channels:
        x = x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    return x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
