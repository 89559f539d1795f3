"""Images that are stored small: compared with PyTorch's interpolation and with autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tadperf.data.enlarge import enlarge, enlarge_adjoint, shrink, small_side


@pytest.mark.parametrize(("small", "side"), [(16, 32), (4, 8), (11, 32), (17, 33), (1, 5), (7, 7), (4, 28)])
def test_enlarging_is_bilinear_interpolation(small, side):
    images = torch.randn(3, 2, small, small)
    wanted = F.interpolate(images.double(), size=(side, side), mode="bilinear", align_corners=False)
    found = enlarge(images, side)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-6)


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 2**16))
def test_the_adjoint_is_the_gradient_of_enlarging(small, more, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, small, small, generator=generator, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 3, small + more, small + more, generator=generator, dtype=torch.float64)
    wide = F.interpolate(images, size=cotangent.shape[2:], mode="bilinear", align_corners=False)
    (wanted,) = torch.autograd.grad(wide, images, cotangent)
    torch.testing.assert_close(enlarge_adjoint(cotangent, small), wanted)


def test_an_image_of_full_size_stays_the_same_tensor():
    images = torch.randn(2, 1, 8, 8)
    assert enlarge(images, 8) is images
    assert enlarge_adjoint(images, 8) is images
    assert shrink(images, 1) is images


@pytest.mark.parametrize(("side", "factor"), [(32, 2), (33, 2), (28, 3), (8, 8), (5, 4)])
def test_a_small_image_keeps_the_mean_brightness(side, factor):
    images = torch.rand(2, 3, side, side)
    small = shrink(images, factor)
    assert small.shape == (2, 3, small_side(side, factor), small_side(side, factor))
    assert small_side(side, factor) * factor >= side
    if side % factor == 0:
        torch.testing.assert_close(small.mean((2, 3)), images.mean((2, 3)))
    constant = torch.full((1, 1, side, side), 0.3)
    torch.testing.assert_close(enlarge(shrink(constant, factor), side), constant)
