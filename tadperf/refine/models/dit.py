"""DiT checkpoints. Uses its own loop over the transformer: diffusers' pipeline can only start from pure noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tadperf.config import RefineConfig
from tadperf.errors import UserError
from tadperf.refine.models import sampling
from tadperf.refine.models.base import DiffusionModel, Target, class_map, compile_part, load_pipeline


def open_model(config: RefineConfig, target: Target) -> DiffusionModel:
    """Opens a diffusion transformer (Peebles and Xie, 2023) from a folder or the hub."""
    from diffusers import DiTPipeline

    dtype = torch.float16 if target.device.type == "cuda" else torch.float32
    pipe = load_pipeline(config.source, DiTPipeline)
    channels, latent = pipe.transformer.config.in_channels, pipe.vae.config.latent_channels
    if channels != latent:
        remedy = (
            f"its transformer takes {channels} latent channels, its VAE makes {latent}; use a model where they agree"
        )
        raise UserError("refine.source", config.source, remedy)
    pipe.to(target.device, dtype)
    return as_diffusion_model(pipe, config, target)


def as_diffusion_model(pipe: Any, config: RefineConfig, target: Target) -> DiffusionModel:
    """Wraps a loaded DiT pipeline."""
    transformer, vae, scheduler = pipe.transformer, pipe.vae, sampling.ddim(pipe.scheduler)
    channels, null = transformer.config.in_channels, transformer.config.num_embeds_ada_norm
    classes = class_map(config, target, null)
    compile_part(transformer, config, target, *sampling.denoiser_calls(config))
    compile_part(vae.decoder, config, target, config.batch, 1)
    side = transformer.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        x = sampling.to_range(images.to(target.device), vae.config.in_channels, side).to(vae.dtype)
        return vae.encode(x).latent_dist.mode().float() * vae.config.scaling_factor

    @torch.no_grad()
    def denoise(prototypes: Tensor, labels: Tensor, image_seeds: Sequence[int], strength: float) -> Tensor:
        labels = classes[labels.to(target.device)]
        guided_labels = torch.cat([labels, torch.full_like(labels, null)]) if config.guidance > 1 else labels

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            inputs = torch.cat([x, x]) if config.guidance > 1 else x
            output = transformer(inputs, timestep=timestep.expand(len(inputs)), class_labels=guided_labels).sample
            output = output[:, :channels]  # the other channels are the learned variance, which DDIM does not use
            return sampling.apply_guidance(output, config.guidance) if config.guidance > 1 else output

        start = prototypes.to(target.device, transformer.dtype)
        noise = sampling.image_noise(start.shape[1:], image_seeds).to(start)
        latents = sampling.denoise_from(predict, scheduler, start, noise, config.steps, strength)
        return sampling.to_pixels(vae.decode(latents / vae.config.scaling_factor).sample, target.shape)

    return DiffusionModel(encode, denoise)
