"""Stable Diffusion checkpoints, through diffusers' image-to-image pipeline with latents as the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tadperf.config import RefineConfig
from tadperf.errors import UserError
from tadperf.refine.models import sampling
from tadperf.refine.models.base import DiffusionModel, Target, compile_part, load_pipeline

LATENTS = 4  # the pipeline treats an image with this number of channels as latents, and encodes any other


def open_model(config: RefineConfig, target: Target) -> DiffusionModel:
    """Opens Stable Diffusion (Rombach et al., 2022) from a folder or the hub; `refine.prompt` describes the classes.

    Latents are the scaled mean of its VAE. The safety checker is off: it turns 32 x 32 images black.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        remedy = "Stable Diffusion needs transformers; install tadperf[stable-diffusion]"
        raise UserError("refine.source", config.source, remedy, topic="extras") from None
    from diffusers import StableDiffusionImg2ImgPipeline

    dtype = torch.float16 if target.device.type == "cuda" else torch.float32
    pipe = load_pipeline(
        config.source,
        StableDiffusionImg2ImgPipeline,
        safety_checker=None,
        requires_safety_checker=False,
    )
    for part, channels in (("VAE", pipe.vae.config.latent_channels), ("UNet", pipe.unet.config.in_channels)):
        if channels != LATENTS:
            remedy = f"its {part} has {channels} latent channels; image-to-image needs {LATENTS}"
            raise UserError("refine.source", config.source, remedy)
    pipe.scheduler = sampling.ddim(pipe.scheduler)
    pipe.to(target.device, dtype)
    return as_diffusion_model(pipe, config, target)


def as_diffusion_model(pipe: Any, config: RefineConfig, target: Target) -> DiffusionModel:
    """Wraps a loaded image-to-image pipeline."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    scale, dtype = pipe.vae.config.scaling_factor, pipe.vae.dtype
    compile_part(pipe.unet, config, target, *sampling.denoiser_calls(config))
    compile_part(pipe.vae.decoder, config, target, config.batch, 1)
    prompts = [config.prompt.replace("{name}", name) for name in target.class_names]

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        x = sampling.to_range(images.to(target.device), pipe.vae.config.in_channels, side).to(dtype)
        return pipe.vae.encode(x).latent_dist.mode().float() * scale

    def denoise(prototypes: Tensor, labels: Tensor, image_seeds: Sequence[int], strength: float) -> Tensor:
        images = pipe(
            [prompts[label] for label in labels.tolist()],
            image=prototypes.to(target.device, dtype),
            strength=strength,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            generator=sampling.generators(image_seeds),
            output_type="pt",
        ).images
        return sampling.to_pixels(images.float() * 2 - 1, target.shape)

    return DiffusionModel(encode, denoise)
