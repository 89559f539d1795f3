"""A small valid call of every operator with its plain PyTorch reference, for tests that try all operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tadperf.kernels as tk


class Case(NamedTuple):
    """An operator as a function of tensors, its plain PyTorch reference, and names and values of its inputs."""

    operator: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: dict[str, Tensor]
    differentiable: bool = False  # whether the first result has a gradient for the first input


class Draws:
    """Seeded random tensors."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def maps(self, *shape: int) -> Tensor:
        return self.normal(*shape).contiguous(memory_format=torch.channels_last)


def sample_cases() -> dict[str, Case]:
    """Operators on rows of samples, features or parameters."""
    draws = Draws(0)
    normal, integers = draws.normal, draws.integers
    labels = {"labels": integers(6, 7), "bias": normal(6)}
    clusters = torch.cat([normal(20).abs() / 3, normal(20) + 5])
    candidates = {"candidates": normal(6, 4, 9), "scores": normal(6, 4), "qualified": normal(5, 9)}
    classes = {"classes": integers(2, 6), "qualified_classes": integers(2, 5)}
    factor = torch.eye(6) + 0.1 * normal(6, 6).tril(-1)
    inputs = {
        "per_sample": {"logits": normal(8, 5), "labels": integers(5, 8)},
        "per_sample_linear": {"features": normal(7, 4), "weight": normal(6, 4), **labels},
        "mixture": {"losses": clusters, "groups": integers(2, 40)},
        "trajectory_distance": {name: normal(3, 50) for name in ("student", "target", "start")},
        "reliability": {"features": normal(9, 6), "anchors": normal(4, 6), "cholesky": factor},
        "diverse_pick": {**candidates, **classes},
    }
    functions = {name: (getattr(tk, name), getattr(tk, f"{name}_reference")) for name in inputs}
    functions["mixture"] = (
        lambda losses, groups: tk.mixture(losses, groups, 2),
        lambda losses, groups: tk.mixture_reference(losses, groups, 2),
    )
    differentiable = ("per_sample", "per_sample_linear", "trajectory_distance")
    return {name: Case(*functions[name], values, name in differentiable) for name, values in inputs.items()}


def norm_cases() -> dict[str, Case]:
    """The forms of norm_relu_pool."""
    draws = Draws(1)
    planes = {"x": draws.normal(3, 5, 6, 6), "weight": draws.normal(5), "bias": draws.normal(5)}
    affine = {name: draws.normal(32) for name in ("weight", "bias", "weight_dot", "bias_dot")}
    dual_inputs = {"x": draws.maps(3, 32, 6, 5), "x_dot": draws.maps(3, 32, 6, 5), **affine}
    pooled = {"grad_value": draws.normal(3, 32, 3, 2), "grad_dot": draws.normal(3, 32, 3, 2)}
    _, moments = tk.norm_relu_pool_moments(planes["x"], planes["weight"], planes["bias"])
    _, dual_moments = as_dual(tk.norm_relu_pool_dual)(*dual_inputs.values())
    gradient_inputs = {"grad_y": draws.normal(3, 5, 3, 3), **planes, "moments": moments}
    dual_gradient_inputs = {**pooled, **dual_inputs, "moments": dual_moments}
    return {
        "norm_relu_pool": Case(tk.norm_relu_pool, tk.norm_relu_pool_reference, planes, True),
        "norm_relu_pool_moments": Case(tk.norm_relu_pool_moments, moments_reference, planes),
        "norm_relu_pool_gradient": Case(tk.norm_relu_pool_gradient, gradient_reference, gradient_inputs),
        "norm_relu_pool_dual": Case(
            as_dual(tk.norm_relu_pool_dual), as_dual(tk.norm_relu_pool_dual_reference), dual_inputs, True
        ),
        "norm_relu_pool_dual_gradient": Case(
            as_dual_gradient(tk.norm_relu_pool_dual_gradient),
            as_dual_gradient(tk.norm_relu_pool_dual_gradient_reference),
            dual_gradient_inputs,
        ),
    }


def convolution_cases() -> dict[str, Case]:
    """conv3x3 and its two gradients."""
    draws = Draws(2)
    maps, kernel, grad = draws.maps(3, 32, 6, 5), draws.normal(48, 32, 3, 3), draws.maps(3, 48, 6, 5)

    def forward(x: Tensor, kernel: Tensor) -> Tensor:
        return torch.conv2d(x, kernel, padding=1)

    def input_gradient(grad: Tensor, kernel: Tensor) -> Tensor:
        x = maps.detach().requires_grad_()
        return torch.autograd.grad(forward(x, kernel), x, grad)[0]

    def kernel_gradient(grad: Tensor, x: Tensor) -> Tensor:
        leaf = kernel.detach().requires_grad_()
        return torch.autograd.grad(forward(x, leaf), leaf, grad)[0]

    return {
        "conv3x3": Case(tk.conv3x3, forward, {"x": maps, "kernel": kernel}, True),
        "conv3x3_input": Case(tk.conv3x3_input, input_gradient, {"grad": grad, "kernel": kernel}),
        "conv3x3_kernel": Case(tk.conv3x3_kernel, kernel_gradient, {"grad": grad, "x": maps}),
    }


def augment_cases() -> dict[str, Case]:
    """differentiable_augment and its adjoint."""
    draws = Draws(3)
    affine = torch.eye(2, 3) + 0.2 * draws.normal(3, 2, 3)
    color = torch.tensor([0.2, 1.4, 0.7]) + 0.1 * draws.normal(3, 3)
    parts = {"affine": affine, "color": color, "hole": draws.integers(6, 3, 2).float()}
    cases = {}
    for name, image in (("differentiable_augment", "x"), ("differentiable_augment_adjoint", "grad")):
        functions = getattr(tk, name), getattr(tk, f"{name}_reference")
        operator, reference = (lambda *inputs, f=f: f(*inputs, hole_side=3) for f in functions)
        cases[name] = Case(operator, reference, {image: draws.normal(3, 2, 6, 5), **parts}, True)
    return cases


def as_dual(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the operator as a function of tensors only."""
    return lambda x, x_dot, *affine: function(tk.Dual(x, x_dot), tk.Affine(*affine))


def as_dual_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the gradient as a function of tensors only."""
    return lambda grad, grad_dot, x, x_dot, w, b, w_dot, b_dot, moments: function(
        tk.Dual(grad, grad_dot), tk.Dual(x, x_dot), tk.Affine(w, b, w_dot, b_dot), moments
    )


def moments_reference(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, (2, 3), correction=0)
    return tk.norm_relu_pool_reference(x, weight, bias), torch.stack((mean, (variance + 1e-5).rsqrt()))


def gradient_reference(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    leaves = x.detach().requires_grad_(), weight.detach().requires_grad_(), bias.detach().requires_grad_()
    return torch.autograd.grad(tk.norm_relu_pool_reference(*leaves), leaves, grad)


def results_of(function: Callable[..., Any], *inputs: Any) -> list[Tensor]:
    """Returns all tensors that the function returns, in one list."""
    results = function(*inputs)
    if isinstance(results, Tensor):
        return [results]
    return [x for part in results for x in (part if isinstance(part, tuple) else (part,))]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 3e-5) -> None:
    assert len(found) == len(expected)
    for result, wanted in zip(found, expected, strict=True):
        assert result.shape == wanted.shape
        scale = max(1.0, float(wanted.abs().nan_to_num(0, 0).max())) if wanted.numel() else 1.0
        torch.testing.assert_close(result, wanted, rtol=0, atol=tolerance * scale, equal_nan=True, check_stride=False)


def same_bits(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a.nan_to_num(7e33), b.nan_to_num(7e33))
        for a, b in zip(found, expected, strict=True)
    )


CASES = {**sample_cases(), **norm_cases(), **convolution_cases(), **augment_cases()}
