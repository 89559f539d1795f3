"""Opens the diffusion model of a config."""

from __future__ import annotations

from tadperf.config import RefineConfig
from tadperf.refine.models import dit, stable, unet
from tadperf.refine.models.base import DiffusionModel, Target, kind


def open_model(config: RefineConfig, target: Target) -> DiffusionModel:
    """The source that a folder or hub name holds; its kind comes from model_index.json."""
    return {"unet": unet, "stable": stable, "dit": dit}[kind(config.source)].open_model(config, target)
