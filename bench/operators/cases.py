"""Further inputs for the checks of a device: hard values, no samples, more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tadperf.bench.operators.engine import Size

INF, NAN = float("inf"), float("nan")
# operator -> the result whose gradient with respect to the first input is checked
GRADIENTS = {
    "per_sample": "loss",
    "per_sample_linear": "loss",
    "trajectory_distance": "ratio",
    "differentiable_augment": "y",
}
WAITS = {"diverse_pick"}  # operators that read sizes from the device, so no CUDA graph can hold them
SMALL: dict[str, Size] = {
    "per_sample": (507, 7),
    "per_sample_linear": (65, 24, 129),
    "mixture": (3000, 3),
    "trajectory_distance": (3, 5003),
    "reliability": (129, 31, 5),
    "diverse_pick": (21, 5, 33, 3),
    "norm_relu_pool": (5, 7, 9, 6),
    "norm_relu_pool_dual": (5, 7, 9, 6),
    "differentiable_augment": (12, 3, 9, 7),
}
# Only operators with independent rows: the last rows are compared. The others would take minutes.
HUGE: dict[str, Size] = {
    "per_sample": (2**31 // 1000 + 999, 1000),
    "trajectory_distance": (2**31 // 320_010 + 9, 320_010),
    "reliability": (2**31 // 512 + 999, 512, 10),
}


def _per_sample() -> list[tuple[Any, ...]]:
    rows = torch.tensor(
        [
            [0.0, 0, 0, 0],
            [1, 1, 0, 1],
            [NAN, 0, 1, 2],
            [INF, 0, 1, 2],
            [INF, INF, 0, 0],
            [-INF, 0, 1, -INF],
            [-INF, -INF, -INF, -INF],
            [88, -88, 0, 88],
            [1e30, -1e30, 1e30, 0],
            [3e38, -3e38, 0, 1],
            [1e-40, 0, 0, 0],
        ]
    )
    wide = torch.randn(5, 1500, generator=torch.Generator().manual_seed(0))
    wide[1, 1499], wide[2, 7], wide[3] = INF, NAN, 0
    ignored = torch.full((5,), -1)
    return [
        (rows, torch.arange(11) % 5 - 1),
        (rows.half(), torch.zeros(11).int()),
        (wide, ignored),
        (wide[:, :2], ignored),
    ]


def _per_sample_linear() -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(67, 19, generator=generator), torch.randn(131, 19, generator=generator)
    weight[7], weight[130] = weight[5], weight[5]  # ties
    features[1], features[2, 3], features[3, 4], features[4] = 0, NAN, INF, 20 * features[4]
    return [(features, weight, torch.arange(67) - 1), (features[:1], weight[:2], torch.tensor([-1]))]


def _mixture() -> list[tuple[Any, ...]]:
    losses = torch.rand(600, generator=torch.Generator().manual_seed(0))
    losses[::2] *= 1e-3
    groups = torch.arange(600) % 6
    losses[groups == 1] = 0.25  # constant
    losses[:60:7], losses[3:90:9], losses[5:99:11] = NAN, INF, -INF
    losses[groups == 3] *= 1e6
    groups[groups == 4] = -1  # this makes the group empty
    lonely = torch.tensor([5, *[0] * 20])
    return [(losses, groups, 6), (torch.arange(21) * 1e-6, lonely.int(), 7)]


def _trajectory_distance() -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    student, target, start = (torch.randn(6, 4099, generator=generator) for _ in range(3))
    start[1], student[2] = target[1], target[2]
    start[3] = student[3] = target[3]
    student[4, 17], target[5, 4098] = NAN, INF
    lengths = (1, 0, 63, 1000, 3035)
    return [
        (student, target, start),
        (student[:, ::2], target[:, ::2], start[0, ::2]),
        (student, target, start, lengths),
    ]


def _reliability() -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    features, anchors = torch.randn(40, 19, generator=generator), torch.randn(4, 19, generator=generator)
    features[0], features[1], features[2, 3], features[3, 4] = 0, anchors[2], NAN, INF
    anchors[3] = anchors[1]
    factor = torch.linalg.cholesky(torch.eye(19) + 0.5)
    return [(features, anchors, factor), (features, anchors[:1], factor)]


def _diverse_pick() -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    candidates, scores = torch.randn(9, 6, 13, generator=generator), torch.rand(9, 6, generator=generator)
    candidates[0, 1], candidates[1, 2, 3], scores[2], scores[3, :3] = 0, NAN, -INF, NAN
    qualified = torch.randn(5, 13, generator=generator)
    qualified[1, 1] = INF
    return [(candidates, scores, qualified, torch.arange(9) % 3, torch.tensor([0, 0, 1, 1, 7]))]


def _norm_relu_pool() -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 7, 6, generator=generator), *torch.randn(2, 5, generator=generator)
    x[0, 1], x[1, 2, 6, 5], x[2, 0, 3, 3] = 0, NAN, INF
    weight[3] = 0
    grad_y = torch.randn(3, 5, 3, 3, generator=generator)
    maps = x, grad_y, x[:, :, :2, :3], grad_y[:, :, :1, :1]
    channels_last = [t.contiguous(memory_format=torch.channels_last) for t in maps]
    pairs = (maps[:2], maps[2:], channels_last[:2], channels_last[2:])
    return [(maps_x, weight, bias, maps_y) for maps_x, maps_y in pairs]


def _differentiable_augment() -> list[tuple[Any, ...]]:
    """Maps with shear and strong zoom, singular ones, and values that are not finite in an image with contrast."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 8, 3, 9, 6, generator=generator)
    affine = torch.randn(8, 2, 3, generator=generator)
    affine[0], affine[1], affine[2, 1] = torch.eye(2, 3), 0, affine[2, 0]
    affine[3], affine[4, :, 2] = 3 * affine[3], 5
    color = torch.rand(8, 3, generator=generator) + 0.2
    color[5:, 2] = 1
    hole = torch.rand(8, 2, generator=generator) * 9
    hole[::3], x[0, 0, 2, 3], x[3, 1, 0, 0] = NAN, NAN, INF
    large = torch.randn(2, 3, 40, 36, generator=generator)  # the mean comes from a kernel of its own
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, grad)]
    return [
        (x, affine, color, hole, grad),
        (last[0], affine, color, hole, last[1]),
        (x[:, :1], affine, color, hole, grad[:, :1]),
        (x[:, :, :1, :1], affine, color, hole, grad[:, :, :1, :1]),
        (large, affine[4:6], color[:2], hole[:2], large.flip(0)),
    ]


def _norm_relu_pool_dual() -> list[tuple[Any, ...]]:
    """The planes of `_norm_relu_pool` with tangents."""
    generator = torch.Generator().manual_seed(1)
    cases = []
    for x, weight, bias, grad in _norm_relu_pool():
        dots = [torch.empty_like(t).copy_(torch.randn(t.shape, generator=generator)) for t in (x, weight, bias, grad)]
        cases.append((x, dots[0], weight, bias, *dots[1:3], grad, dots[3]))
    return cases


HARD: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "per_sample": _per_sample,
    "per_sample_linear": _per_sample_linear,
    "mixture": _mixture,
    "trajectory_distance": _trajectory_distance,
    "reliability": _reliability,
    "diverse_pick": _diverse_pick,
    "norm_relu_pool": _norm_relu_pool,
    "norm_relu_pool_dual": _norm_relu_pool_dual,
    "differentiable_augment": _differentiable_augment,
}


def without_samples(name: str, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the same inputs with zero samples."""
    samples = {"per_sample": 2, "mixture": 2, "trajectory_distance": 3, "reliability": 1, "differentiable_augment": 5}
    if name == "per_sample_linear":
        return inputs[0][:0], inputs[1], inputs[2][:0]
    if name == "norm_relu_pool":
        return inputs[0][:0], *inputs[1:3], inputs[3][:0]
    if name == "norm_relu_pool_dual":
        return *(x[:0] for x in inputs[:2]), *inputs[2:6], *(x[:0] for x in inputs[6:])
    if name == "diverse_pick":
        return inputs[0][:0], inputs[1][:0], inputs[2], inputs[3][:0], inputs[4]
    return tuple(x[:0] if place < samples[name] else x for place, x in enumerate(inputs))


def last_rows(name: str, inputs: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """Returns the inputs of a call on the last rows only, for an operator in HUGE."""
    return (inputs[0][-rows:], *inputs[1:]) if name == "reliability" else tuple(x[-rows:] for x in inputs)


def to_device(device: torch.device, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the inputs with their tensors on this device."""
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in inputs)
