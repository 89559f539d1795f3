"""Settings and fixtures for all tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from tadperf.config import Config

# pytest runs one process per core, so each process, and every process that a test starts, uses one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def one_thread():
    """Runs PyTorch on one thread: on tensors of a few kilobytes a second thread only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# A run of about a second on the built-in digits.
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


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Config]:
    """Returns a function that makes the tiny config with the fields `section__key=value`."""
    from tadperf.config.merge import merge

    def tiny(**fields: Any) -> Config:
        values = TINY | {name.replace("__", "."): value for name, value in fields.items()}
        return merge("digits", None, [f"{name}={json.dumps(value)}" for name, value in values.items()])

    return tiny
