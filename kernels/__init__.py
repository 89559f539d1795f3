"""Fused operators for training on noisy labels; usable alone: imports torch and numpy, and nothing of tadperf."""

from __future__ import annotations

from tadperf.kernels import native
from tadperf.kernels.per_sample import PerSample, per_sample, per_sample_reference

__all__ = ["PerSample", "implementations", "per_sample", "per_sample_reference"]


def implementations() -> dict[str, dict[str, str]]:
    """What runs where: {operator: {device: "native", "triton" or "reference"}}, for float32 tensors."""
    return {"per_sample": {"cpu": "native" if native.available() else "reference", "cuda": "reference"}}
