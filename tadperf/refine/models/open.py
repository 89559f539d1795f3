"""Opens the diffusion model of a config."""

from __future__ import annotations

from tadperf.config import RefineConfig
from tadperf.refine.models import dit, stable, unet
from tadperf.refine.models.base import DiffusionModel, Target, model_kind


def open_model(config: RefineConfig, target: Target) -> DiffusionModel:
    """Opens the model in a folder or hub repository. Raises UserError if it cannot be used for the data."""
    return {"unet": unet, "stable": stable, "dit": dit}[model_kind(config.source)].open_model(config, target)
