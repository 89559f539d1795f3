"""Stable Diffusion checkpoints, through diffusers' image-to-image pipeline with latents as the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tadperf.config import RefineConfig
from tadperf.errors import UserError
from tadperf.refine.models import sampling
from tadperf.refine.models.base import DiffusionModel, Target, load_pipeline, speed_up

LATENTS = 4  # channels that the pipeline takes for latents; an image of any other number it would encode


def open_model(config: RefineConfig, target: Target) -> DiffusionModel:
    """Stable Diffusion (Rombach et al., 2022), its checkpoint in a folder or on the hub; classes by `refine.prompt`.

    The latents are those of its VAE's mean, scaled. The safety checker is left out: it blackens images of 32 x 32.
    """
    try:
        import transformers  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        remedy = "needs the text encoder of transformers; install tadperf[stable-diffusion]"
        raise UserError("refine.source", config.source, remedy) from None
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


def as_diffusion_model(pipe, config: RefineConfig, target: Target) -> DiffusionModel:
    """A loaded image-to-image pipeline as a source."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    scale, dtype = pipe.vae.config.scaling_factor, pipe.vae.dtype
    speed_up(pipe.unet, config, target, *sampling.denoising(config))
    speed_up(pipe.vae.decoder, config, target, config.batch, 1)
    prompts = [config.prompt.replace("{name}", name) for name in target.class_names]

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        x = sampling.to_range(images.to(target.device), pipe.vae.config.in_channels, side).to(dtype)
        return pipe.vae.encode(x).latent_dist.mode().float() * scale

    def denoise(prototypes: Tensor, labels: Tensor, image_seeds: Sequence[int], strength: float) -> Tensor:
        made = pipe(
            [prompts[label] for label in labels.tolist()],
            image=prototypes.to(target.device, dtype),
            strength=strength,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            generator=sampling.generators(image_seeds),
            output_type="pt",
        ).images
        return sampling.to_pixels(made.float() * 2 - 1, target.shape)

    return DiffusionModel(encode, denoise)
