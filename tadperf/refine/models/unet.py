"""A class-conditional UNet over pixels: diffusers' UNet2DModel with a null class, kept as a DDIMPipeline folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.config import DiffusionConfig, RefineConfig
from tadperf.errors import UserError
from tadperf.refine.models import sampling
from tadperf.refine.models.base import DiffusionModel, Target, class_map, load_pipeline, speed_up

LEVELS = 5  # at most: each halves the side


def build(config: DiffusionConfig, shape: tuple[int, int, int], num_classes: int, seed: int):
    """An untrained UNet for images of `shape`; the class after the last stands for none (tadperf).

    Levels are added until the side is 4, with attention there alone; images are padded until every level halves.
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


def schedulers():
    """DDPM's noise levels to train by (Ho et al., 2020; cosine, Nichol and Dhariwal, 2021) and DDIM's to sample by."""
    from diffusers import DDIMScheduler, DDPMScheduler

    training = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    return training, DDIMScheduler.from_config(training.config, timestep_spacing="trailing")


def pad(x: Tensor, side: int) -> Tensor:
    """Floats [B, C, H, W] with their edges repeated to [B, C, side, side]."""
    below, right = side - x.shape[-2], side - x.shape[-1]
    return F.pad(x, (right // 2, right - right // 2, below // 2, below - below // 2), mode="replicate")


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pad`."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def open_model(config: RefineConfig, target: Target) -> DiffusionModel:
    """What `train` made, or another class-conditional DDPM or DDIM pipeline, in a folder or on the hub."""
    from diffusers import DDIMPipeline

    pipe = load_pipeline(config.source, DDIMPipeline)
    return as_diffusion_model(pipe.unet, pipe.scheduler, config, target)  # pyright: ignore[reportAttributeAccessIssue]


def as_diffusion_model(unet, scheduler, config: RefineConfig, target: Target) -> DiffusionModel:
    """A UNet with its sampling scheduler as a source; raises UserError where it does not fit the data."""
    channels, height, width = target.shape
    null = (unet.config.num_class_embeds or 1) - 1
    classes = class_map(config, target, null)
    side = unet.config.sample_size
    if unet.config.in_channels != channels or side < max(height, width):
        takes = f"takes images of {unet.config.in_channels} x {side} x {side}"
        raise UserError("refine.source", config.source, f"{takes}, the data have {channels} x {height} x {width}")
    unet, sampler = unet.to(target.device).eval(), sampling.ddim(scheduler)
    speed_up(unet, config, target, *sampling.denoising(config))

    def encode(images: Tensor) -> Tensor:
        return pad(sampling.to_range(images.to(target.device), channels, height), side)

    @torch.no_grad()
    def denoise(prototypes: Tensor, labels: Tensor, image_seeds: Sequence[int], strength: float) -> Tensor:
        labels = classes[labels.to(target.device)]
        both = torch.cat([labels, torch.full_like(labels, null)]) if config.guidance > 1 else labels

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            if config.guidance == 1:
                return unet(x, timestep, labels).sample
            return sampling.guided(unet(torch.cat([x, x]), timestep, both).sample, config.guidance)

        start = prototypes.to(target.device)
        drawn = sampling.noise(start.shape[1:], image_seeds).to(start)
        x = sampling.from_noised(predict, sampler, start, drawn, config.steps, strength)
        return sampling.to_pixels(crop(x, height, width), target.shape)

    return DiffusionModel(encode, denoise)


def save(folder: Path, unet, scheduler) -> None:
    """Writes diffusers' own folder format, wholly or not at all."""
    import shutil

    from diffusers import DDIMPipeline

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    DDIMPipeline(unet, scheduler).save_pretrained(partial)
    partial.rename(folder)
