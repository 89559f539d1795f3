"""Compares tadperf.kernels.mixture with EM in plain PyTorch and scikit-learn: `tadperf bench mixture`.

N losses in G groups; three of four losses are clean. All providers run to convergence, except scikit-learn, which stops
as its settings say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tadperf.bench.operators.engine import Bench, Provider, Size
from tadperf.kernels import Mixture, mixture, mixture_reference

STEPS = 2000  # maximum steps of EM; it needs 30 to 300 on these losses
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def inputs(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor, int]:
    rows, groups = size
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(rows, device=device, generator=generator)
    clean = torch.rand(rows, device=device, generator=generator) < 0.75
    losses = torch.where(clean, 0.3 * noise.abs(), 2.5 + 0.8 * noise).clamp(min=0)
    return losses.to(dtype), torch.arange(rows, device=device) % groups, groups


def moved(size: Size, dtype: torch.dtype) -> int:
    """Bytes: reads losses and int64 groups, writes posteriors."""
    rows, _ = size
    return rows * (dtype.itemsize + 8 + 4)


def step(x: Tensor, groups: Tensor, count: Tensor, theta: Tensor) -> Tensor:
    """Runs one step of EM on standardised losses for all groups. theta: weight, mean and variance [G, 2, 3]."""
    weight, mean, variance = theta[groups].unbind(-1)
    share = (weight.log() - 0.5 * (variance.log() + (x.unsqueeze(-1) - mean).square() / variance)).softmax(-1)
    moments = torch.stack([share, share * x.unsqueeze(-1), share * x.square().unsqueeze(-1)], -1)
    total, first, second = torch.zeros_like(theta).index_add_(0, groups, moments).unbind(-1)
    mean = first / total
    return torch.stack([total / count, mean, second / total - mean.square() + 1e-6], -1)


def em(step: Step) -> Callable[[Tensor, Tensor, int], dict[str, Tensor]]:
    """Returns a function that runs EM for all groups at once, from one deviation below and above each group's mean."""

    def posteriors(losses: Tensor, groups: Tensor, num_groups: int) -> dict[str, Tensor]:
        losses = losses.float()
        count = groups.bincount(minlength=num_groups).unsqueeze(1)
        sums = losses.new_zeros(num_groups, 2).index_add_(0, groups, torch.stack([losses, losses.square()], 1))
        mean, square = (sums / count).unbind(1)
        x = (losses - mean[groups]) / (square - mean.square()).sqrt()[groups]
        theta = losses.new_tensor([[0.5, -1.0, 0.5], [0.5, 1.0, 0.5]]).repeat(num_groups, 1, 1)
        for _ in range(STEPS // 10):
            before = theta
            for _ in range(10):
                theta = step(x, groups, count, theta)
            if (theta - before).abs().max() < 1e-5:
                break
        weight, mean, variance = theta[groups].unbind(-1)
        odds = weight.log() - 0.5 * (variance.log() + (x.unsqueeze(-1) - mean).square() / variance)
        return {"posterior": odds.softmax(-1)[:, 0]}

    return posteriors


def sklearn(scaled: bool = False, **settings: Any) -> Callable[[Tensor, Tensor, int], dict[str, Tensor]]:
    """scikit-learn's GaussianMixture(2), one group after another. scaled: scales losses to 0..1 as DivideMix does."""
    from sklearn.mixture import GaussianMixture

    def posteriors(losses: Tensor, groups: Tensor, num_groups: int) -> dict[str, Tensor]:
        clean = torch.empty(len(losses))
        for group in range(num_groups):
            members = (groups == group).nonzero().squeeze(1)
            x = losses[members].float().unsqueeze(1).numpy()
            x = (x - x.min()) / (x.max() - x.min()) if scaled else x
            fitted: Any = GaussianMixture(2, random_state=0, **settings).fit(x)
            lower = fitted.means_.argmin()
            clean[members] = torch.from_numpy(fitted.predict_proba(x)[:, lower]).float()
        return {"posterior": clean}

    return posteriors


def reference(losses: Tensor, groups: Tensor, num_groups: int) -> Mixture:
    return mixture_reference(losses, groups, num_groups)


BENCH = Bench(
    name="mixture",
    axes=("N", "G"),
    sizes=dict.fromkeys(("cpu", "cuda"), ((50_000, 10), (1_280_000, 1000))),
    inputs=inputs,
    moved=moved,
    reference=reference,
    providers={
        "tadperf": Provider("tadperf", lambda: mixture),
        "eager": Provider("eager", lambda: em(step)),
        "eager-squarem": Provider("eager", lambda: mixture_reference),
        "inductor": Provider("inductor", lambda: em(torch.compile(step))),
        # scikit-learn's defaults, and DivideMix's settings, which stop after ten steps
        "sklearn": Provider("peer", sklearn, "sklearn", tolerance=(0.0, 0.1), slack=0.05),
        "sklearn-dividemix": Provider(
            "peer",
            lambda: sklearn(scaled=True, max_iter=10, tol=1e-2, reg_covar=5e-4),
            "sklearn",
            tolerance=(0.0, 0.1),
            slack=0.05,
        ),
    },
    tolerance={
        "posterior": (0.0, 1e-3),
        "iterations": None,  # depends on the last bits
        **dict.fromkeys(("weight", "mean", "variance", "log_likelihood"), (1e-3, 1e-4)),
    },
)
