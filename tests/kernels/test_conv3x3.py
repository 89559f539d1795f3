"""Compares Winograd's convolution and its gradients with PyTorch's convolution in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tadperf.kernels import native
from tadperf.kernels.ops.conv3x3 import conv3x3, conv3x3_input, conv3x3_kernel, covers

compiled = pytest.mark.skipif(not native.available(), reason="the compiled part is not built")
SHAPES = [  # images, channels in and out, height, width
    (2, 32, 48, 5, 7),
    (3, 64, 32, 8, 8),
    (1, 32, 32, 1, 1),
    (7, 128, 128, 16, 16),
    (2, 32, 32, 2, 3),
    (70, 48, 32, 3, 2),
    (1, 256, 32, 4, 4),
]


def case(shape: tuple[int, ...], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Returns x, kernel and grad in float64, and y with both gradients."""
    images, channels, out, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = (images, channels, height, width), (out, channels, 3, 3), (images, out, height, width)
    x, kernel, grad = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    for leaf in (x, kernel):
        leaf.requires_grad_()
    y = torch.conv2d(x, kernel, padding=1)
    return [x.detach(), kernel.detach(), grad], [y.detach(), *torch.autograd.grad(y, [x, kernel], grad)]


def last(x: Tensor) -> Tensor:
    return x.float().contiguous(memory_format=torch.channels_last)


def close(found: Tensor, truth: Tensor) -> None:
    assert found.shape == truth.shape
    assert float((found.double() - truth).abs().max()) <= 3e-6 * float(truth.abs().max())


def check(inputs: list[Tensor], truth: list[Tensor]) -> None:
    x, kernel, grad = inputs
    for found, wanted in zip(
        (conv3x3(x, kernel), conv3x3_input(grad, kernel), conv3x3_kernel(grad, x)), truth, strict=True
    ):
        close(found, wanted)


@compiled
@pytest.mark.parametrize("isa", range(len(native.module().isas()) if native.available() else 0))  # pyright: ignore
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_against_float64(shape, isa, monkeypatch):
    monkeypatch.setattr(native, "isa_index", lambda: isa)
    inputs, truth = case(shape)
    assert covers(last(inputs[0]), shape[1], shape[2])
    check([last(part) for part in inputs], truth)
    check([part.float() for part in inputs], truth)  # contiguous maps are copied to channels_last


@pytest.mark.parametrize("shape", [(2, 3, 32, 5, 5), (2, 40, 32, 4, 4), (1, 512, 32, 2, 2), (2, 16, 16, 4, 4)])
def test_other_maps_run_the_convolution_of_pytorch(shape):
    inputs, truth = case(shape)
    assert not covers(last(inputs[0]), shape[1], shape[2])
    check([last(part) for part in inputs], truth)
    x, kernel, grad = inputs
    assert torch.equal(conv3x3(x, kernel), truth[0])  # float64
    assert torch.equal(conv3x3_kernel(grad, x), truth[2])


@compiled
@settings(deadline=None)
@given(st.integers(1, 9), st.sampled_from([32, 48]), st.sampled_from([32, 64]), st.integers(1, 9), st.integers(1, 9))
def test_any_shape(images, channels, out, height, width):
    inputs, truth = case((images, channels, out, height, width), seed=height * 10 + width)
    check([last(part) for part in inputs], truth)


@compiled
def test_same_bits_for_any_number_of_threads():
    inputs = [last(part) for part in case((40, 32, 32, 8, 8))[0]]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            x, kernel, grad = inputs
            found.append([conv3x3(x, kernel), conv3x3_input(grad, kernel), conv3x3_kernel(grad, x)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@compiled
def test_first_derivatives_are_right_and_second_ones_raise():
    (x, kernel, grad), truth = case((2, 32, 32, 4, 6))
    x, kernel = last(x).requires_grad_(), last(kernel).requires_grad_()
    y = conv3x3(x, kernel)
    for found, wanted in zip((y, *torch.autograd.grad(y, [x, kernel], last(grad))), truth, strict=True):
        close(found.detach(), wanted)
    (only,) = torch.autograd.grad(conv3x3(x.detach(), kernel).sum(), kernel)
    assert only.shape == kernel.shape
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(conv3x3(x, kernel).sum(), kernel, create_graph=True)


@compiled
def test_hard_values():
    x, kernel = last(torch.zeros(2, 32, 6, 6)), last(torch.ones(32, 32, 3, 3))
    assert not conv3x3(x, kernel).any()
    x[1, 3, 2, 2] = float("nan")
    y = conv3x3(x, kernel)
    assert not y[0].any()
    assert y[1, :, 1:4, 1:4].isnan().all()  # all pixels that depend on it
    assert not y[1, :, 4:, :].isnan().any()  # none in another tile
    assert conv3x3(x[:0], kernel).shape == (0, 32, 6, 6)
    assert not conv3x3_kernel(x[:0], x[:0]).any()
    with pytest.raises(ValueError, match="multiples of 16"):
        native.call("conv3x3", last(torch.zeros(1, 17, 1, 1)), torch.zeros(16, 17 * 16), last(torch.zeros(1, 16, 1, 1)))


def test_inputs_that_do_not_fit_are_refused():
    x, kernel, grad = torch.zeros(2, 32, 4, 4), torch.zeros(48, 32, 3, 3), torch.zeros(2, 48, 4, 4)
    for other in (kernel[:, :16], kernel[..., :2], kernel.double(), kernel[0]):
        with pytest.raises(ValueError, match="kernel: "):
            conv3x3(x, other)
    with pytest.raises(ValueError, match="kernel: "):
        conv3x3_input(grad[:, :32], kernel)
    for other in (grad[:1], grad[:, :, :2], grad.double(), grad[0]):
        with pytest.raises(ValueError, match="grad: "):
            conv3x3_kernel(other, x)


@compiled
def test_a_profiler_sees_compiled_calls():
    x, kernel = last(torch.randn(3, 64, 8, 8)), last(torch.randn(32, 64, 3, 3))
    with torch.profiler.profile() as profile:
        conv3x3(x, kernel)
    assert any(event.key.startswith("tadperf::conv3x3") for event in profile.key_averages())
