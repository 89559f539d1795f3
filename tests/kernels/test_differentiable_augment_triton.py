"""The Triton kernels of differentiable_augment: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tadperf.kernels import differentiable_augment_reference
from tadperf.kernels.gpu import launch_configs
from tadperf.kernels.ops import differentiable_augment as module

from .augment_cases import (
    FULL,
    STRATEGIES,
    Arguments,
    dot,
    dsa_parts,
    free_parts,
    gradient_of_reference,
    normal,
    without_brightness,
)

pytest.importorskip("triton")
LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


def run(function: str, x: Tensor, parts: Arguments, tile: int = 8192) -> Tensor:
    """Runs a launcher in blocks of `tile` values. The interpreter takes long for each program."""
    from tadperf.kernels.gpu import differentiable_augment as triton_kernels

    with launch_configs.override(lambda *_: {"tile": tile, "num_warps": 4}), np.errstate(all="ignore"):
        return getattr(triton_kernels, function)(x, *parts)


def compare(shape: tuple[int, ...], parts: Arguments, seed: int, tile: int = 8192, last: bool = False) -> None:
    """Compares both kernels with float64 PyTorch, and checks that they are adjoint to each other."""
    x, grad = (normal(shape, seed + k).contiguous(memory_format=LAST if last else CONTIGUOUS) for k in (1, 2))
    y, grad_x = run("differentiable_augment", x, parts, tile), run("differentiable_augment_adjoint", grad, parts, tile)
    assert y.stride() == x.stride()
    truth, truth_x = differentiable_augment_reference(x.double(), *parts), gradient_of_reference(shape, parts, grad)
    for found, expected in ((y, truth), (grad_x, truth_x)):
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * scale)
    linear = without_brightness(parts)
    left = dot(y if parts[1] is None else run("differentiable_augment", x, linear, tile), grad)
    right = dot(x, grad_x)
    size = float(truth_x.norm() * x.double().norm())
    assert abs(left - right) <= 1e-5 * (1 + size)


@pytest.mark.interpreter
@pytest.mark.parametrize("strategy", ["color_cutout", "rotate", FULL])
def test_draws_in_several_blocks(strategy):
    shape = (5, 3, 9, 9)
    compare(shape, dsa_parts(strategy, shape, 3), 0, tile=128)


@pytest.mark.interpreter
@settings(max_examples=15, deadline=None)
@given(st.sampled_from(STRATEGIES), st.integers(1, 33), st.sampled_from((1, 3)), st.booleans(), st.integers(0, 2**31))
def test_draws_of_any_size(strategy, size, channels, last, seed):
    shape = (2, channels, size, size)
    compare(shape, dsa_parts(strategy, shape, seed), seed, last=last)


@pytest.mark.interpreter
@settings(max_examples=6, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from((1, 2, 5)), st.integers(0, 2**31))
def test_any_affine_map(height, width, channels, seed):
    """Singular maps and strong zooms need windows that are larger than those of a draw."""
    shape = (4, channels, height, width)
    compare(shape, free_parts(shape, seed), seed)


@pytest.mark.interpreter
@pytest.mark.parametrize("strategy", ["rotate", FULL])
def test_large_images_with_means_from_another_kernel(strategy):
    shape = (2, 3, 37, 41)
    parts = dsa_parts(strategy, shape, 0)
    if parts[1] is not None:
        parts[1][0] = torch.tensor([0.3, 1.5, 0.6])
    compare(shape, parts, 0)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_types(dtype):
    shape = (6, 3, 8, 8)
    parts, x = dsa_parts(FULL, shape, 0), normal(shape, 1).to(dtype)
    found = run("differentiable_augment", x, parts)
    assert found.dtype == dtype
    expected = differentiable_augment_reference(x.double(), *parts)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    expected = gradient_of_reference(shape, parts, x)
    torch.testing.assert_close(
        run("differentiable_augment_adjoint", x, parts).double(), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.interpreter
def test_flips_and_shifts_by_whole_pixels_are_exact():
    x = normal((2, 3, 16, 16), 0)
    affine = torch.eye(2, 3).repeat(2, 1, 1)
    affine[0, 0, 0], affine[1, :, 2] = -1, torch.tensor([3 * 2 / 16, -2 * 2 / 16])
    y = run("differentiable_augment", x, (affine, None, None, 1))
    assert torch.equal(y[0], x[0].flip(-1))
    assert torch.equal(y[1, :, 2:, :13], x[1, :, :14, 3:])
    assert not y[1, :, :2].any()
    assert not y[1, :, :, 13:].any()


@pytest.mark.interpreter
def test_values_that_are_not_finite():
    """NaN in one image leaves the others as they are. Coordinates that are not finite read nothing."""
    x = normal((4, 3, 6, 6), 0)
    x[1, 0, 2, 3], x[2, 1, 0, 0] = math.nan, math.inf
    affine, color = torch.eye(2, 3).repeat(4, 1, 1), torch.tensor([0.1, 1.5, 0.7]).repeat(4, 1)
    affine[1, 0, 2], affine[3] = 2.5 * 2 / 6, math.nan
    hole = torch.full((4, 2), math.nan)
    y = run("differentiable_augment", x, (affine, color, hole, 3))
    expected = differentiable_augment_reference(x[:3].double(), affine[:3], color[:3], hole[:3], 3)
    torch.testing.assert_close(y[:3].double(), expected, rtol=0, atol=1e-5, equal_nan=True)
    assert y[1, :, :, :4].isnan().all()
    assert not y[1, :, :, 4:].any()
    assert not y[3].any()
    grad_x = run("differentiable_augment_adjoint", normal((4, 3, 6, 6), 1), (affine, color, hole, 3))
    assert grad_x[:3].isfinite().all()
    assert not grad_x[3].any()


@pytest.mark.interpreter
def test_derivatives_of_the_compiled_operator(monkeypatch):
    """The operator and its adjoint are each other's derivative, to any order."""
    monkeypatch.setattr(module, "is_fused", lambda x, *parts: True)
    shape = (6, 3, 5, 5)
    parts = dsa_parts(FULL, shape, 3)
    x, grad = normal(shape, 1).requires_grad_(), normal(shape, 2).requires_grad_()
    pairs = (
        (module.differentiable_augment, module.differentiable_augment_reference),
        (
            module.differentiable_augment_adjoint,
            module.differentiable_augment_adjoint_reference,
        ),
    )
    with np.errstate(all="ignore"):
        for operator, reference in pairs:
            y = operator(x, *parts)
            (grad_x,) = torch.autograd.grad(y, x, grad, create_graph=True)
            (again,) = torch.autograd.grad(grad_x, grad, x.detach())
            expected = reference(x, *parts)
            (expected_grad,) = torch.autograd.grad(expected, x, grad)
            # y is linear in x up to a constant. PyTorch 2.11 cannot differentiate grid_sample twice.
            linear = expected - reference(torch.zeros_like(x), *parts)
            for found, wanted in ((y, expected), (grad_x, expected_grad), (again, linear)):
                torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
            assert "_Augment" in type(operator(x, *parts).grad_fn).__name__


@pytest.mark.interpreter
def test_views_and_other_layouts():
    shape = (5, 3, 6, 6)
    affine, color, hole, side = dsa_parts(FULL, (9, *shape[1:]), 0)
    parts = affine[2:7], color[2:7], hole[2:7], side
    whole = normal((5, 3, 6, 12), 1)
    for x in (whole[..., ::2], whole[..., :6].transpose(2, 3), torch.complex(whole, -whole).conj().imag[..., 6:]):
        with np.errstate(all="ignore"):
            y = module._launch(x, parts[:3], side, False)
        torch.testing.assert_close(y, differentiable_augment_reference(x, *parts), rtol=0, atol=2e-5)


def signature(name: str, pointer: str) -> dict[str, str]:
    """Returns the Triton types of the arguments of a kernel."""
    images = {"augment": "x_ptr y_ptr", "adjoint": "grad_ptr grad_x_ptr", "means": "x_ptr"}[name].split()
    floats = ["affine_ptr", "color_ptr", "hole_ptr", "means_ptr"]
    sizes = ["channels", "height", "width", "pixel_step", "channel_step", "side"]
    return dict.fromkeys(images, f"*{pointer}") | dict.fromkeys(floats, "*fp32") | dict.fromkeys(sizes, "i32")


@pytest.mark.parametrize(
    ("name", "pointer", "adjacent", "constants"),
    [
        ("augment", "fp32", "pixel_step", {"means_ptr": None}),
        ("adjoint", "fp32", "pixel_step", {"means_ptr": None}),
        ("augment", "bf16", "channel_step", {}),
        ("adjoint", "bf16", "channel_step", {}),
        ("means", "fp32", "channel_step", {"ADJOINT": True}),
    ],
)
def test_compiles_without_spills(aot, name, pointer, adjacent, constants):
    """Compiles for images with 3 channels, contiguous and channels_last."""
    from tadperf.kernels.gpu import differentiable_augment as triton_kernels

    types = signature(name, pointer)
    for entry in launch_configs.shipped("differentiable_augment"):
        fixed = {**constants, adjacent: 1, "CHANNELS": 4, "BLOCK": entry["tile"] // 4}
        arguments = {key: kind for key, kind in types.items() if key not in fixed}
        found = aot(getattr(triton_kernels, f"{name}_kernel"), arguments, fixed, num_warps=entry["num_warps"])
        assert {target: used.spills for target, used in found.items()} == dict.fromkeys(found, 0)
        assert all(used.registers <= 128 for target, used in found.items() if target.startswith("sm_"))
