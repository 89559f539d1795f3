"""Compares trajectory_distance with plain PyTorch and torch.compile: `tadperf bench trajectory_distance`.

B pairs of P parameters, each with its own start; 320 010 is the ConvNet of CIFAR-10, width 128 and depth 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tadperf.bench.operators.engine import Bench, Provider, Size, plain
from tadperf.kernels import TrajectoryDistance, trajectory_distance, trajectory_distance_reference


def inputs(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    student, target, start = (torch.randn(size, device=device, generator=generator, dtype=dtype) for _ in range(3))
    return student, target, start


def moved(size: Size, dtype: torch.dtype) -> int:
    """Bytes: reads three inputs; writes three floats for each row."""
    rows, parameters = size
    return rows * (3 * parameters * dtype.itemsize + 3 * 4)


def eager(student: Tensor, target: Tensor, start: Tensor) -> TrajectoryDistance:
    """The code of published scripts, in float32."""
    student, target, start = student.float(), target.float(), start.float()
    distance, expert_distance = ((student - target) ** 2).sum(-1), ((start - target) ** 2).sum(-1)
    return TrajectoryDistance(distance, expert_distance, distance / expert_distance)


def dot(student: Tensor, target: Tensor, start: Tensor) -> TrajectoryDistance:
    """Computes the same with dot products, which square and sum in one operation."""
    a, b = student.float() - target.float(), start.float() - target.float()
    distance, expert_distance = torch.linalg.vecdot(a, a), torch.linalg.vecdot(b, b)
    return TrajectoryDistance(distance, expert_distance, distance / expert_distance)


BENCH = Bench(
    name="trajectory_distance",
    axes=("B", "P"),
    sizes={"cpu": ((1, 320_010), (64, 320_010)), "cuda": ((1, 320_010), (64, 320_010), (1000, 320_010))},
    inputs=inputs,
    moved=moved,
    reference=trajectory_distance_reference,
    providers={"tadperf": Provider("tadperf", lambda: trajectory_distance), **plain({"": eager, "dot": dot})},
    tolerance=dict.fromkeys(("distance", "expert_distance", "ratio"), (1e-5, 0.0)),
)
