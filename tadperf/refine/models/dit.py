"""DiT checkpoints: a loop of our own over their transformer, since diffusers' pipeline starts from noise alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tadperf.config import RefineConfig
from tadperf.errors import UserError
from tadperf.refine.models import sampling
from tadperf.refine.models.base import DiffusionModel, Target, class_map, load_pipeline, speed_up


def open_model(config: RefineConfig, target: Target) -> DiffusionModel:
    """A diffusion transformer (Peebles and Xie, 2023) in a folder or on the hub."""
    from diffusers import DiTPipeline

    dtype = torch.float16 if target.device.type == "cuda" else torch.float32
    pipe = load_pipeline(config.source, DiTPipeline)
    channels, latent = pipe.transformer.config.in_channels, pipe.vae.config.latent_channels
    if channels != latent:
        remedy = f"its transformer takes {channels} latent channels, its VAE makes {latent}; they must agree"
        raise UserError("refine.source", config.source, remedy)
    pipe.to(target.device, dtype)
    return as_diffusion_model(pipe, config, target)


def as_diffusion_model(pipe, config: RefineConfig, target: Target) -> DiffusionModel:
    """A loaded DiT pipeline as a source."""
    transformer, vae, scheduler = pipe.transformer, pipe.vae, sampling.ddim(pipe.scheduler)
    channels, null = transformer.config.in_channels, transformer.config.num_embeds_ada_norm
    classes = class_map(config, target, null)
    speed_up(transformer, config, target, *sampling.denoising(config))
    speed_up(vae.decoder, config, target, config.batch, 1)
    side = transformer.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        x = sampling.to_range(images.to(target.device), vae.config.in_channels, side).to(vae.dtype)
        return vae.encode(x).latent_dist.mode().float() * vae.config.scaling_factor

    @torch.no_grad()
    def denoise(prototypes: Tensor, labels: Tensor, image_seeds: Sequence[int], strength: float) -> Tensor:
        labels = classes[labels.to(target.device)]
        both = torch.cat([labels, torch.full_like(labels, null)]) if config.guidance > 1 else labels

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            twice = torch.cat([x, x]) if config.guidance > 1 else x
            said = transformer(twice, timestep=timestep.expand(len(twice)), class_labels=both).sample
            said = said[:, :channels]  # the rest is the learned variance, which DDIM does not use
            return sampling.guided(said, config.guidance) if config.guidance > 1 else said

        start = prototypes.to(target.device, transformer.dtype)
        drawn = sampling.noise(start.shape[1:], image_seeds).to(start)
        latents = sampling.from_noised(predict, scheduler, start, drawn, config.steps, strength)
        return sampling.to_pixels(vae.decode(latents / vae.config.scaling_factor).sample, target.shape)

    return DiffusionModel(encode, denoise)
