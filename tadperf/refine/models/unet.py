"""A class-conditional UNet over pixels: diffusers' UNet2DModel with a null class, saved as a DDIMPipeline folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.config import DiffusionConfig, RefineConfig
from tadperf.errors import UserError
from tadperf.refine.models import guidance, sampling
from tadperf.refine.models.base import DiffusionModel, Target, class_map, compile_part, load_pipeline

LEVELS = 5  # largest number of levels; each level halves the side; not tuned


def build(config: DiffusionConfig, shape: tuple[int, int, int], num_classes: int, seed: int) -> Any:
    """Returns an untrained UNet for images of `shape`; class number `num_classes` means "no class" (tadperf).

    Adds levels until the side is about 4. Only the middle block has attention. Images are padded so that each level can
    halve them.
    """
    from diffusers import UNet2DModel

    channels, height, width = shape
    levels = min(LEVELS, max(1, round(math.log2(max(height, width) / 4)) + 1))
    multiple = 2 ** (levels - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=-(-max(height, width) // multiple) * multiple,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(config.width, *[2 * config.width] * (levels - 1)),
            layers_per_block=config.layers,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            norm_num_groups=8,
            attention_head_dim=config.width,
            num_class_embeds=num_classes + 1,
        )


def schedulers() -> tuple[Any, Any]:
    """Returns a DDPM scheduler for training (Ho et al., 2020) and a DDIM scheduler for sampling.

    The noise levels follow the cosine of Nichol and Dhariwal (2021).
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    training = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    return training, DDIMScheduler.from_config(training.config, timestep_spacing="trailing")


def pad(x: Tensor, side: int) -> Tensor:
    """Pads floats [B, C, H, W] to [B, C, side, side] by repeating the edges."""
    below, right = side - x.shape[-2], side - x.shape[-1]
    return F.pad(x, (right // 2, right - right // 2, below // 2, below - below // 2), mode="replicate")


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Undoes `pad`."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def open_model(config: RefineConfig, target: Target) -> DiffusionModel:
    """Opens a class-conditional DDPM or DDIM pipeline, such as one that `train` saved, from a folder or the hub."""
    from diffusers import DDIMPipeline

    pipe = load_pipeline(config.source, DDIMPipeline)
    return as_diffusion_model(pipe.unet, pipe.scheduler, config, target)


def as_diffusion_model(unet: Any, scheduler: Any, config: RefineConfig, target: Target) -> DiffusionModel:
    """Wraps a UNet and its scheduler. Raises UserError if the UNet does not fit the data."""
    channels, height, width = target.shape
    null = (unet.config.num_class_embeds or 1) - 1
    classes = class_map(config, target, null)
    side = unet.config.sample_size
    if unet.config.in_channels != channels or side < max(height, width):
        takes = f"the model takes images of {unet.config.in_channels} x {side} x {side}"
        raise UserError("refine.source", config.source, f"{takes}, the data have {channels} x {height} x {width}")
    unet, sampler = unet.to(target.device).eval(), sampling.ddim(scheduler)
    guided = guidance.is_guided(config)
    if guided:
        unet.requires_grad_(False)  # guidance differentiates by the images only, in eager mode
    else:
        compile_part(unet, config, target, *sampling.denoiser_calls(config))

    def encode(images: Tensor) -> Tensor:
        return pad(sampling.to_range(images.to(target.device), channels, height), side)

    def predict(x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        labels = classes[labels]
        if config.guidance == 1:
            return unet(x, timestep, labels).sample
        guided_labels = torch.cat([labels, torch.full_like(labels, null)])
        return sampling.apply_guidance(unet(torch.cat([x, x]), timestep, guided_labels).sample, config.guidance)

    guide = guidance.open_guide(unet.mid_block, predict, encode, sampler, config, target) if guided else None

    @torch.no_grad()
    def denoise(prototypes: Tensor, labels: Tensor, image_seeds: Sequence[int], strength: float) -> Tensor:
        step = partial(predict, labels=labels.to(target.device))
        if guide is not None:
            step = partial(guidance.guided_prediction, guide, step, labels=labels.to(target.device))
        start = prototypes.to(target.device)
        noise = sampling.image_noise(start.shape[1:], image_seeds).to(start)
        x = sampling.denoise_from(step, sampler, start, noise, config.steps, strength)
        return sampling.to_pixels(crop(x, height, width), target.shape)

    return DiffusionModel(encode, denoise, joint=guided)


def save(folder: Path, unet: Any, scheduler: Any) -> None:
    """Saves a folder in diffusers' format, completely or not at all."""
    from diffusers import DDIMPipeline

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    DDIMPipeline(unet, scheduler).save_pretrained(partial)
    partial.rename(folder)
