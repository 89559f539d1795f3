"""Tiny pipelines of diffusers' classes with random weights, saved like checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import pytest
import torch

VAE: dict[str, Any] = {
    "block_out_channels": (4, 4),
    "norm_num_groups": 2,
    "sample_size": 8,
    "latent_channels": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory) -> Path:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer: Any = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=3,
        norm_num_groups=4,
    )
    vae: Any = AutoencoderKL(**VAE)
    scheduler: Any = DDIMScheduler(clip_sample=False)
    folder = tmp_path_factory.mktemp("checkpoints") / "dit"
    DiTPipeline(transformer, vae, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stable_folder(tmp_path_factory) -> Path:
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        norm_num_groups=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    tokenizer = clip_tokenizer(folder)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vae = AutoencoderKL(**VAE)
    # As in SD 1.5: without Runge-Kutta steps, and with time steps shifted by one.
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear")
    pipeline: Any = StableDiffusionPipeline
    pipe = pipeline(
        vae,
        CLIPTextModel(text),
        tokenizer,
        unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "stable")
    return folder / "stable"


def clip_tokenizer(folder: Path):
    """Returns CLIP's tokenizer for single letters and digits."""
    from transformers import CLIPTokenizer

    letters = [*ascii_lowercase, *digits]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: folder for folder, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=32)
