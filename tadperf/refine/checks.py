"""Checks of the refinement config that need no data."""

from __future__ import annotations

from pathlib import Path

from tadperf.config import Config
from tadperf.errors import UserError
from tadperf.refine.models import sampling
from tadperf.refine.models.base import model_kind
from tadperf.refine.models.guidance import is_guided
from tadperf.refine.start import config_of


def check_refine_config(config: Config) -> None:
    """Raises UserError for a mistake that shows in the config alone."""
    refine = config.refine
    if refine.top_k > refine.candidates:
        raise UserError("refine.top_k", refine.top_k, f"must not be above refine.candidates = {refine.candidates}")
    if is_guided(refine) and refine.backend not in ("auto", "eager"):
        remedy = "guidance differentiates the denoiser, which runs eagerly; use eager or auto, or set refine.attraction"
        raise UserError("refine.backend", refine.backend, f"{remedy} and refine.repulsion to 0")
    if "{name}" not in refine.prompt:
        raise UserError("refine.prompt", refine.prompt, "must contain {name}, which stands for the class name")
    if refine.reach < refine.strength:
        raise UserError("refine.reach", refine.reach, f"must not be below refine.strength = {refine.strength}")
    sampling.num_steps(refine.steps, refine.strength)
    if refine.source != "train":
        model_kind(refine.source)
    if refine.start:
        config_of(Path(refine.start))
