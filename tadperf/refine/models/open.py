"""Opens the diffusion model of a config."""

from __future__ import annotations

from tadperf.config import RefineConfig
from tadperf.errors import UserError
from tadperf.refine.models import dit, stable, unet
from tadperf.refine.models.base import DiffusionModel, Target, model_kind
from tadperf.refine.models.guidance import is_guided


def open_model(config: RefineConfig, target: Target) -> DiffusionModel:
    """Opens the model in a folder or hub repository. Raises UserError if it cannot be used for the data."""
    kind = model_kind(config.source)
    if is_guided(config) and kind != "unet":
        remedy = "only a UNet over pixels can be guided; set refine.attraction and refine.repulsion to 0"
        raise UserError("refine.source", config.source, remedy)
    return {"unet": unet, "stable": stable, "dit": dit}[kind].open_model(config, target)
