"""Fused operators for training on noisy labels; usable alone: imports torch and numpy, and nothing of tadperf."""

from __future__ import annotations

from tadperf.kernels import gpu, native
from tadperf.kernels.diverse_pick import DiversePick, diverse_pick, diverse_pick_reference
from tadperf.kernels.mixture import Mixture, mixture, mixture_reference
from tadperf.kernels.norm_relu_pool import norm_relu_pool, norm_relu_pool_reference
from tadperf.kernels.per_sample import PerSample, per_sample, per_sample_reference
from tadperf.kernels.per_sample_linear import per_sample_linear, per_sample_linear_reference
from tadperf.kernels.reliability import Reliability, reliability, reliability_reference
from tadperf.kernels.trajectory_distance import TrajectoryDistance, trajectory_distance, trajectory_distance_reference

__all__ = [
    "DiversePick",
    "Mixture",
    "PerSample",
    "Reliability",
    "TrajectoryDistance",
    "diverse_pick",
    "diverse_pick_reference",
    "implementations",
    "mixture",
    "mixture_reference",
    "norm_relu_pool",
    "norm_relu_pool_reference",
    "per_sample",
    "per_sample_linear",
    "per_sample_linear_reference",
    "per_sample_reference",
    "reliability",
    "reliability_reference",
    "trajectory_distance",
    "trajectory_distance_reference",
]


def implementations() -> dict[str, dict[str, str]]:
    """What runs where: {operator: {device: "native", "triton" or "reference"}}, for float32 tensors."""
    cpu, triton = "native" if native.available() else "reference", "triton" if gpu.available() else "reference"
    return {
        "diverse_pick": {"cpu": cpu, "cuda": triton},
        "mixture": {"cpu": cpu, "cuda": triton},
        "norm_relu_pool": {"cpu": cpu, "cuda": triton},
        "per_sample_linear": {"cpu": cpu, "cuda": triton},
        "per_sample": {"cpu": cpu, "cuda": triton},
        "reliability": {"cpu": cpu, "cuda": triton},
        "trajectory_distance": {"cpu": cpu, "cuda": triton},
    }
