"""Fixture: a config for runs of about a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tadperf.config import Config
from tadperf.config.merge import merge

TINY: dict[str, Any] = {
    "data.path": "digits",
    "device": "cpu",
    "net.width": 4,
    "net.depth": 1,
    "experts.count": 1,
    "experts.epochs": 2,
    "match.ipc": 1,
    "match.iterations": 4,
    "match.check_every": 2,
    "match.steps": 2,
    "match.max_start": 1,
    "match.expert_epochs": 1,
    "match.init": "real",
    "evaluate.epochs": 2,
    "evaluate.repeats": 1,
    "evaluate.full_epochs": 1,
    "evaluate.full_repeats": 1,
    "trust.mode": "off",
    "trust.rounds": 1,
    "trust.proxies": 1,
    "trust.epochs": 1,
    "detector.depth": 1,
    "detector.width": 8,
    "detector.epochs": 2,
    "diffusion.width": 8,
    "diffusion.iterations": 3,
    "diffusion.batch": 8,
    "refine.steps": 4,
    "refine.rounds": 1,
    "refine.candidates": 2,
    "refine.top_k": 1,
}


def tiny(**fields: Any) -> Config:
    values = TINY | {name.replace("__", "."): value for name, value in fields.items()}
    return merge("digits", None, [f"{name}={json.dumps(value)}" for name, value in values.items()])


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Config]:
    """Returns a function that makes the tiny config with the fields `section__key=value`."""
    return tiny
