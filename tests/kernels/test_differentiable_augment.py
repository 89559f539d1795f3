"""differentiable_augment and its adjoint in plain PyTorch. tests/data/test_augment.py compares with kornia and DSA."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tadperf.data import augment
from tadperf.kernels import (
    differentiable_augment,
    differentiable_augment_adjoint,
    differentiable_augment_adjoint_reference,
    differentiable_augment_reference,
)
from tadperf.kernels.ops import differentiable_augment as module

from .augment_cases import (
    FULL,
    STRATEGIES,
    dot,
    dsa_parts,
    free_parts,
    gradient_of_reference,
    normal,
    without_brightness,
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (4, 1, 1, 1), (4, 3, 5, 9)])
def test_the_adjoint_is_the_gradient_of_the_operator(strategy, shape):
    parts = dsa_parts(strategy, shape, 1)
    grad = normal(shape, 2).double()
    expected = gradient_of_reference(shape, parts, grad)
    found = differentiable_augment_adjoint_reference(grad, *parts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert torch.equal(differentiable_augment_adjoint(grad, *parts), found)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(STRATEGIES), st.integers(1, 33), st.integers(1, 33), st.sampled_from((1, 3)), st.integers(0, 2**31)
)
def test_adjoint_identity(strategy, height, width, channels, seed):
    """<A x, y> = <x, A' y> for the linear part A of every strategy and of maps that no strategy draws."""
    shape = (3, channels, height, width)
    for parts in (dsa_parts(strategy, shape, seed), free_parts(shape, seed)):
        linear = without_brightness(parts)
        x, y = normal(shape, seed + 1).double(), normal(shape, seed + 2).double()
        left = dot(differentiable_augment_reference(x, *linear), y)
        right = dot(x, differentiable_augment_adjoint_reference(y, *linear))
        assert abs(left - right) <= 1e-11 * (1 + abs(left))


@pytest.mark.parametrize("size", [8, 13])
def test_at_most_three_pixels_of_a_draw_read_a_pixel_in_each_direction(size):
    """The Triton adjoint tries floor(2 h) + 1 output pixels in each direction: at most 3 for a draw, and enough."""
    zoom, angle = torch.tensor([1 / augment.SCALE, augment.SCALE]).double(), math.radians(augment.ROTATE)
    limits = [torch.tensor([[x, 0, 0], [0, y, 0]]).double() for x in (*zoom, -1.0) for y in zoom]
    limits += [torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]]) for a in (-angle, angle)]
    drawn = augment.draw(FULL, 200, size, torch.Generator().manual_seed(0)).affine
    assert drawn is not None
    affine = torch.cat([drawn.double(), torch.stack([limit.double() for limit in limits])])
    half = torch.linalg.inv(affine[:, :, :2]).abs().sum(2)
    assert float((torch.floor(2 * half) + 1).max()) == 3
    grid = torch.nn.functional.affine_grid(affine, [len(affine), 1, size, size], align_corners=False)
    source = ((grid.flatten(1, 2) + 1) * size - 1) / 2
    pixel = torch.cartesian_prod(*[torch.arange(size).double()] * 2).flip(1)
    reads = ((source[:, :, None] - pixel).abs() < 1).all(3)  # [N, output pixels, input pixels]
    for place in pixel.T[:, None, :, None]:
        highest, lowest = (torch.where(reads, place, end) for end in (-math.inf, math.inf))
        assert (highest.amax(1) - lowest.amin(1) < 3).all()


def test_the_operator_is_linear_up_to_the_brightness():
    shape = (5, 3, 7, 7)
    parts = dsa_parts(STRATEGIES[-1], shape, 0)
    x, y = normal(shape, 1).double(), normal(shape, 2).double()
    difference = differentiable_augment(x + y, *parts) - differentiable_augment(x, *parts)
    torch.testing.assert_close(difference, differentiable_augment(y, *without_brightness(parts)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_types_are_computed_in_float32(dtype):
    shape = (6, 3, 9, 9)
    parts = dsa_parts(STRATEGIES[-1], shape, 0)
    x = normal(shape, 1).to(dtype)
    for function in (differentiable_augment, differentiable_augment_adjoint):
        found = function(x, *parts)
        assert found.dtype == dtype
        assert torch.equal(found, function(x.float(), *parts).to(dtype))


@pytest.mark.parametrize("function", [differentiable_augment, differentiable_augment_adjoint])
def test_nothing_to_do(function):
    x = normal((2, 3, 4, 4), 0)
    assert function(x) is x
    parts = dsa_parts(STRATEGIES[-1], (0, 3, 4, 4), 0)
    assert function(x[:0], *parts).shape == (0, 3, 4, 4)


def test_coordinates_that_are_not_finite_have_no_gradient():
    """They must not reach an index."""
    affine = torch.full((2, 2, 3), float("nan"))
    affine[1] = float("inf")
    assert not differentiable_augment_adjoint(normal((2, 3, 4, 4), 0), affine).any()


def test_a_compiled_function_contains_plain_pytorch():
    shape = (3, 3, 6, 6)
    affine, color, hole, side = dsa_parts(STRATEGIES[-1], shape, 0)
    x = normal(shape, 1)

    def step(x: Tensor) -> Tensor:
        y = differentiable_augment(x, affine, color, hole, side)
        return differentiable_augment_adjoint(y, affine, color, hole, side)

    torch.compiler.reset()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, step(x), rtol=0, atol=1e-6)


def test_derivatives_of_any_order():
    shape = (4, 2, 5, 4)
    parts = dsa_parts(STRATEGIES[-1], shape, 0)
    x = normal(shape, 1).double().requires_grad_()
    for function in (differentiable_augment, differentiable_augment_adjoint):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, *parts), x)
    assert torch.autograd.gradgradcheck(lambda x: differentiable_augment_adjoint(x, *parts), x)


def test_which_tensors_run_the_kernels(monkeypatch):
    monkeypatch.setattr(module, "is_direct", lambda *tensors: True)
    monkeypatch.setattr(module.gpu, "available", lambda: True)

    def like(**changed: Any) -> Any:
        return SimpleNamespace(**{"is_cuda": True, "dtype": torch.float32, "shape": (2, 3), **changed})

    fixed, learned = torch.zeros(1), torch.zeros(1, requires_grad=True)
    assert module.is_fused(like(), fixed, None)
    assert module.is_fused(like(dtype=torch.bfloat16), fixed)
    assert not module.is_fused(like(is_cuda=False), fixed)
    assert not module.is_fused(like(dtype=torch.float64), fixed)
    assert not module.is_fused(like(shape=(2, 65)), fixed)
    assert not module.is_fused(like(), fixed, learned)
    with torch.no_grad():
        assert module.is_fused(like(), fixed, learned)


X, AFFINE = torch.zeros(2, 3, 4, 5), torch.zeros(2, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, "x: torch.float32 (3, 4, 5): expected floats [N, C, H, W], C, H and W of 1 or more"),
        ({"x": X.int()}, "x: torch.int32 (2, 3, 4, 5): expected floats [N, C, H, W], C, H and W of 1 or more"),
        ({"x": X[:, :0]}, "x: torch.float32 (2, 0, 4, 5): expected floats [N, C, H, W], C, H and W of 1 or more"),
        ({"affine": AFFINE[:1]}, "affine: torch.float32 (1, 2, 3) on cpu: expected floats (2, 2, 3) on cpu"),
        ({"affine": AFFINE.int()}, "affine: torch.int32 (2, 2, 3) on cpu: expected floats (2, 2, 3) on cpu"),
        ({"color": X[:, 0, 0]}, "color: torch.float32 (2, 5) on cpu: expected floats (2, 3) on cpu"),
        ({"hole": torch.zeros(2)}, "hole: torch.float32 (2,) on cpu: expected floats (2, 2) on cpu"),
        (
            {"hole": torch.zeros(2, 2, device="meta")},
            "hole: torch.float32 (2, 2) on meta: expected floats (2, 2) on cpu",
        ),
        ({"hole": torch.zeros(2, 2), "hole_side": 0}, "hole_side: 0: expected 1 or more"),
    ],
)
def test_errors(arguments, message):
    arguments = {"x": X, **arguments}
    for function in (differentiable_augment, differentiable_augment_reference):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            function(**arguments)
    x = arguments.pop("x")
    message = message.replace("x:", "grad:", 1) if message.startswith("x:") else message
    for function in (differentiable_augment_adjoint, differentiable_augment_adjoint_reference):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            function(x, **arguments)
