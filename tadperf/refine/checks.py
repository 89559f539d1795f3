"""Checks of the refinement config that need no data."""

from __future__ import annotations

from pathlib import Path

from tadperf.config import Config
from tadperf.errors import UserError
from tadperf.refine import start
from tadperf.refine.models import sampling
from tadperf.refine.models.base import kind


def check_refine_config(config: Config) -> None:
    """Refuses what can be known to be wrong before anything is computed."""
    r = config.refine
    if r.top_k > r.candidates:
        raise UserError("refine.top_k", r.top_k, f"must not be above refine.candidates = {r.candidates}")
    if "{name}" not in r.prompt:
        raise UserError("refine.prompt", r.prompt, "must hold {name}, where the class's name goes")
    if r.reach < r.strength:
        raise UserError("refine.reach", r.reach, f"must not be below refine.strength = {r.strength}")
    sampling.taken(r.steps, r.strength)
    if r.source != "train":
        kind(r.source)
    if r.start:
        start.config_of(Path(r.start))
