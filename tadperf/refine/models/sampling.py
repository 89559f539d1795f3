"""What the sources share: noise per image, the way back from a noised prototype, pixels to a model's range and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.config import RefineConfig
from tadperf.errors import UserError


def generators(image_seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image: its noise then depends on no other image and on no device."""
    return [torch.Generator().manual_seed(seed) for seed in image_seeds]


def noise(shape: Sequence[int], image_seeds: Sequence[int]) -> Tensor:
    """Standard normal float32 [B, *shape], each image from its own seed."""
    return torch.stack([torch.randn(*shape, generator=g) for g in generators(image_seeds)])


def ddim(scheduler: Any) -> Any:
    """The deterministic DDIM sampler (Song et al., 2021) over a scheduler's noise levels.

    The noise of the start is then all the chance there is: one seed, one image.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(scheduler.config)


def from_noised(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    start: Tensor,
    drawn: Tensor,
    steps: int,
    strength: float,
) -> Tensor:
    """Noises `start` [B, ...] to the step that `strength` sets and denoises it, as diffusers' image-to-image does.

    predict: (noised [B, ...], timestep) to the model's prediction; drawn: standard normal [B, ...].
    """
    scheduler.set_timesteps(steps, device=start.device)
    timesteps = scheduler.timesteps[steps - taken(steps, strength) :]
    x = scheduler.add_noise(start, drawn, timesteps[:1].expand(len(start)))
    for timestep in timesteps:
        x = scheduler.step(predict(x, timestep), timestep, x).prev_sample
    return x


def taken(steps: int, strength: float) -> int:
    """Denoising steps that a strength leaves of `steps`; diffusers rounds down, 0 raises UserError."""
    count = min(int(steps * strength), steps)
    if count < 1:
        remedy = f"leaves no step of refine.steps = {steps}; must be at least {1 / steps:.3g}"
        raise UserError("refine.strength", strength, remedy)
    return count


def denoising(config: RefineConfig) -> tuple[int, int]:
    """Rows of a call of the denoiser, and its calls for a batch of first images; candidates take some more."""
    return config.batch * (2 if config.guidance > 1 else 1), taken(config.steps, config.strength)


def guided(both: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022) of what was said with labels [B], then without [B]."""
    conditional, unconditional = both.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def to_range(images: Tensor, channels: int, side: int) -> Tensor:
    """uint8 images [B, C, H, W] as float32 [B, channels, side, side] in [-1, 1]; grey fills three channels."""
    x = images.float().div(127.5).sub(1)
    if x.shape[1] != channels:
        x = x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    return x.contiguous()


def to_pixels(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Floats [B, c, h, w] in [-1, 1] as uint8 [B, *shape], clamped, rounded, resized where they have to be."""
    channels, height, width = shape
    x = x.float()
    if x.shape[-2:] != (height, width):
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False)
    if x.shape[1] != channels:
        x = x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    return x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
