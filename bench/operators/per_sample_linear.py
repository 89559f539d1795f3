"""Compares per_sample_linear with code that stores all logits, eager and compiled: `tadperf bench per_sample_linear`.

N samples of D features under a linear classifier of C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tadperf.bench.operators import per_sample as logits_bench
from tadperf.bench.operators.engine import Bench, Provider, Size, plain
from tadperf.kernels import PerSample, per_sample, per_sample_linear, per_sample_linear_reference


def inputs(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    rows, width, classes = size
    generator = torch.Generator(device).manual_seed(seed)
    features = torch.randn(rows, width, device=device, generator=generator, dtype=dtype)
    weight = torch.randn(classes, width, device=device, generator=generator, dtype=dtype).mul_(3 * width**-0.5)
    return features, weight, torch.randint(classes, (rows,), device=device, generator=generator)


def moved(size: Size, dtype: torch.dtype) -> int:
    """Bytes: reads features, weight and int64 labels, writes four floats and an int64."""
    rows, width, classes = size
    return (rows + classes) * width * dtype.itemsize + rows * (8 + 4 * 4 + 8)


def eager(features: Tensor, weight: Tensor, labels: Tensor) -> PerSample:
    return logits_bench.eager(torch.nn.functional.linear(features.float(), weight.float()), labels)


def max_twice(features: Tensor, weight: Tensor, labels: Tensor) -> PerSample:
    return logits_bench.max_twice(torch.nn.functional.linear(features.float(), weight.float()), labels)


def per_sample_of_logits(features: Tensor, weight: Tensor, labels: Tensor) -> PerSample:
    """Calls our operator per_sample on stored logits, to show the gain of not storing them."""
    return per_sample(torch.nn.functional.linear(features.float(), weight.float()), labels)


BENCH = Bench(
    name="per_sample_linear",
    axes=("N", "D", "C"),
    sizes={
        "cpu": ((20_000, 128, 1000), (2000, 256, 20_000)),
        "cuda": ((50_000, 512, 1000), (8192, 1024, 128_000)),
    },
    inputs=inputs,
    moved=moved,
    reference=per_sample_linear_reference,
    providers={
        "tadperf": Provider("tadperf", lambda: per_sample_linear),
        **plain({"": eager, "max": max_twice}),
        "eager-per_sample": Provider("eager", lambda: per_sample_of_logits),
    },
    tolerance=dict.fromkeys(("loss", "confidence", "margin", "entropy"), (1e-4, 1e-4)),
)
