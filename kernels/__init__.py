"""Fused operators for training on noisy labels. The package imports torch, and no other part of tadperf."""

from __future__ import annotations

from tadperf.kernels.ops.conv3x3 import conv3x3, conv3x3_input, conv3x3_kernel
from tadperf.kernels.ops.differentiable_augment import (
    differentiable_augment,
    differentiable_augment_adjoint,
    differentiable_augment_adjoint_reference,
    differentiable_augment_reference,
)
from tadperf.kernels.ops.diverse_pick import DiversePick, diverse_pick, diverse_pick_reference
from tadperf.kernels.ops.mixture import Mixture, mixture, mixture_reference
from tadperf.kernels.ops.norm_relu_pool import (
    norm_relu_pool,
    norm_relu_pool_gradient,
    norm_relu_pool_moments,
    norm_relu_pool_reference,
)
from tadperf.kernels.ops.norm_relu_pool_dual import (
    Affine,
    Dual,
    norm_relu_pool_dual,
    norm_relu_pool_dual_gradient,
    norm_relu_pool_dual_gradient_reference,
    norm_relu_pool_dual_reference,
)
from tadperf.kernels.ops.per_sample import PerSample, per_sample, per_sample_reference
from tadperf.kernels.ops.per_sample_linear import per_sample_linear, per_sample_linear_reference
from tadperf.kernels.ops.reliability import Reliability, reliability, reliability_reference
from tadperf.kernels.ops.trajectory_distance import (
    TrajectoryDistance,
    trajectory_distance,
    trajectory_distance_reference,
)
from tadperf.kernels.registry import implementations

__all__ = [
    "Affine",
    "DiversePick",
    "Dual",
    "Mixture",
    "PerSample",
    "Reliability",
    "TrajectoryDistance",
    "conv3x3",
    "conv3x3_input",
    "conv3x3_kernel",
    "differentiable_augment",
    "differentiable_augment_adjoint",
    "differentiable_augment_adjoint_reference",
    "differentiable_augment_reference",
    "diverse_pick",
    "diverse_pick_reference",
    "implementations",
    "mixture",
    "mixture_reference",
    "norm_relu_pool",
    "norm_relu_pool_dual",
    "norm_relu_pool_dual_gradient",
    "norm_relu_pool_dual_gradient_reference",
    "norm_relu_pool_dual_reference",
    "norm_relu_pool_gradient",
    "norm_relu_pool_moments",
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
