"""Compares norm, ReLU and pool with tangents, forward and backward, with torch.func in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tadperf.kernels import norm_relu_pool_reference
from tadperf.kernels.ops.norm_relu_pool_dual import (
    Affine,
    Dual,
    norm_relu_pool_dual,
    norm_relu_pool_dual_gradient,
    norm_relu_pool_dual_gradient_reference,
    norm_relu_pool_dual_reference,
)

SHAPES = [(2, 6, 5, 7), (3, 32, 8, 8), (2, 40, 4, 4), (1, 3, 6, 6), (2, 1, 2, 2), (4, 19, 3, 3)]


def case(shape: tuple[int, ...], pool: bool) -> tuple[Dual, Affine, Dual, list[Tensor]]:
    """Returns inputs in float64, and the results of torch.func: jvp of the forward pass, and jvp of its vjp."""
    torch.manual_seed(0)
    x, x_dot = torch.randn(2, *shape, dtype=torch.float64)
    weight, bias, weight_dot, bias_dot = torch.randn(4, shape[1], dtype=torch.float64)

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm_relu_pool_reference(x, weight, bias, 1e-5, pool)

    def backward(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(forward, x, weight, bias)[1](grad)

    values, dots = (x, weight, bias), (x_dot, weight_dot, bias_dot)
    y, y_dot = torch.func.jvp(forward, values, dots)  # pyright: ignore[reportAssignmentType]
    grad, grad_dot = torch.randn(2, *y.shape, dtype=torch.float64)
    of, of_dot = torch.func.jvp(backward, (*values, grad), (*dots, grad_dot))  # pyright: ignore[reportAssignmentType]
    affine = Affine(weight, bias, weight_dot, bias_dot)
    return Dual(x, x_dot), affine, Dual(grad, grad_dot), [y, y_dot, of[0], *of_dot]


def close(found: list[Tensor], truth: list[Tensor], limit: float) -> None:
    for ours, wanted in zip(found, truth, strict=True):
        assert ours.shape == wanted.shape
        assert float((ours.double() - wanted).norm()) <= limit * float(wanted.norm()) + 1e-12


def last(x: Tensor) -> Tensor:
    return x.float().contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.float()


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_equal_torch_func(shape, pool):
    x, affine, grad, truth = case(shape, pool)
    y, moments = norm_relu_pool_dual_reference(x, affine, 1e-5, pool)
    of_x, of_weight, of_bias = norm_relu_pool_dual_gradient_reference(grad, x, affine, moments, pool)
    close([*y, *of_x, of_weight, of_bias], truth, 1e-12)
    single = Dual(*map(last, x)), Affine(*map(last, affine))
    y, moments = norm_relu_pool_dual(*single, 1e-5, pool)
    of_x, of_weight, of_bias = norm_relu_pool_dual_gradient(Dual(*map(last, grad)), *single, moments, pool)
    close([*y, *of_x, of_weight, of_bias], truth, 1e-5)


def test_same_bits_for_any_number_of_threads():
    x, affine, grad, _ = case((9, 40, 6, 6), True)
    single, gradient = (Dual(*map(last, x)), Affine(*map(last, affine))), Dual(*map(last, grad))
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, moments = norm_relu_pool_dual(*single)
        of_x, *others = norm_relu_pool_dual_gradient(gradient, *single, moments)
        found.append([*y, *of_x, *others])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_constant_planes_and_nan():
    """A plane without variance has finite derivatives; a NaN stays in its image and channel."""
    x, affine, grad, _ = case((2, 8, 4, 4), True)
    x.value[0, 3] = 0.25
    x.value[1, 5, 0, 0] = torch.nan
    single = Dual(*map(last, x)), Affine(*map(last, affine))
    y, moments = norm_relu_pool_dual(*single)
    of_x, _, _ = norm_relu_pool_dual_gradient(Dual(*map(last, grad)), *single, moments)
    for part in (*y, *of_x):
        assert part[0].isfinite().all()
        assert part[1, [0, 1, 2, 3, 4, 6, 7]].isfinite().all()
    assert y.value[1, 5].isnan().all()


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("sigmas", [5, 20, 100])
def test_moments_are_exact_with_an_outlier_in_the_first_pixel(
    sigmas: int, size: int, memory_format: torch.memory_format
) -> None:
    """Zero padding makes such corner pixels. Errors of means are in standard deviations, other errors are relative."""
    torch.manual_seed(0)
    x, x_dot = torch.randn(2, 2, 40, size, size) + 3
    x[..., 0, 0] = 3 + sigmas
    inputs = Dual(*(t.contiguous(memory_format=memory_format) for t in (x, x_dot)))
    affine = Affine(*torch.randn(4, 40))
    exact = Dual(x.double(), x_dot.double()), Affine(*(t.double() for t in affine))
    _, truth = norm_relu_pool_dual_reference(*exact)
    _, moments = norm_relu_pool_dual(inputs, affine)
    error = (moments - truth).abs() / torch.stack([1 / truth[1], truth[1], 1 / truth[1], torch.ones_like(truth[1])])
    assert float(error.max()) < 2e-6, error.amax((1, 2)).tolist()
