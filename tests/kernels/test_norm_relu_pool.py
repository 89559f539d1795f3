from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tadperf.kernels import native, norm_relu_pool, norm_relu_pool_reference
from tadperf.kernels.ops import norm_relu_pool as module

compiled = native.module()
ISAS = range(len(compiled.isas())) if compiled else ()
needs_native = pytest.mark.skipif(compiled is None, reason=native.reason())
LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# Small planes (transposed), incomplete groups of channels, wide planes of odd height, large planes of odd size.
SHAPES = [
    (0, 3, 4, 4),
    (1, 1, 2, 2),
    (2, 3, 3, 5),
    (3, 5, 7, 7),
    (2, 20, 8, 8),
    (5, 33, 4, 4),
    (2, 17, 9, 16),
    (2, 16, 32, 32),
    (1, 130, 2, 3),
    (1, 300, 9, 10),
    (2, 3, 33, 35),
    (1, 2, 7, 160),
]


def random_case(shape, dtype=torch.float32, memory_format=CONTIGUOUS, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=random) * 2 + 1).to(dtype).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(2, shape[1], generator=random)
    return x, weight, bias


def results(operator, inputs, pool, seed=1):
    """Returns y and the gradients of x, weight and bias, for an upstream gradient that every type holds exactly."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = operator(*inputs, pool=pool)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).mul(32).round().div(32).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, inputs, grad_y)


def assert_close(found, expected, dtype=torch.float32):
    tolerance = TOLERANCE[dtype]
    for result, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(result.double(), wanted.double(), atol=tolerance, rtol=tolerance, equal_nan=True)


def truth(inputs, pool):
    """Returns the results of PyTorch's layers and autograd in float64."""

    def layers(x, weight, bias, pool):
        norm = nn.functional.instance_norm(x, weight=weight, bias=bias) if x.numel() else x
        return nn.AvgPool2d(2 if pool else 1)(norm.relu())

    return results(layers, [t.double() for t in inputs], pool)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, LAST])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_every_instruction_set_against_float64(isa, memory_format, shape, monkeypatch):
    monkeypatch.setattr(native, "isa_index", lambda: isa)
    for dtype, pool in product((torch.float32, torch.bfloat16, torch.float16), (True, False)):
        inputs = random_case(shape, dtype, memory_format)
        assert_close(results(norm_relu_pool, inputs, pool), truth(inputs, pool), dtype)


@pytest.mark.parametrize("operator", [norm_relu_pool, norm_relu_pool_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operator_and_reference_against_float64(operator, dtype):
    for shape in SHAPES[1:5]:
        inputs = [t.to(dtype) for t in random_case(shape)]
        assert_close(results(operator, inputs, True), truth(inputs, True), dtype)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 33, 35)])
def test_without_compiled_code(shape, monkeypatch):
    monkeypatch.setattr(module, "_compiled", lambda x: None)
    for memory_format, pool in product((CONTIGUOUS, LAST), (True, False)):
        inputs = random_case(shape, memory_format=memory_format)
        found = results(norm_relu_pool, inputs, pool)
        assert_close(found, truth(inputs, pool))
        assert found[1].stride() == inputs[0].stride()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_no_less_accurate_than_pytorch(scale):
    """Our error against float64 is at most that of PyTorch in float32, plus 1e-6 of the largest value."""
    x, weight, bias = random_case((4, 8, 32, 32))
    inputs = x * scale + 3 * scale, weight, bias
    expected = truth(inputs, True)
    found = results(norm_relu_pool, inputs, True), results(norm_relu_pool_reference, inputs, True)
    for ours, theirs, wanted in zip(*found, expected, strict=True):
        assert (ours - wanted).abs().max() <= (theirs - wanted).abs().max() + 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 20, 4, 4), (2, 20, 32, 32), (1, 3, 5, 7)])
def test_constant_planes_have_no_variance(shape):
    """For a constant, also in 1 x 1 planes: y is exactly max(0, bias), and the gradient of x is finite.

    The rounding error of the mean is squared in float32, which overflows for constants from about 1e25.
    """
    _, weight, bias = random_case(shape)
    for value in (0.0, 0.1, -3.3e6, 1e20):
        for memory_format in (CONTIGUOUS, LAST):
            x = torch.full(shape, value).contiguous(memory_format=memory_format)
            y, grad_x, of_weight, _ = results(norm_relu_pool, (x, weight, bias), shape[2] > 1)
            assert torch.equal(y, bias.relu()[:, None, None].expand_as(y))
            assert torch.equal(of_weight, torch.zeros_like(weight))
            assert grad_x.isfinite().all()


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, LAST])
@pytest.mark.parametrize("side", [5, 32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_makes_only_its_own_plane_nan(bad, side, memory_format):
    x, weight, bias = random_case((3, 20, side, side), memory_format=memory_format)
    clean = results(norm_relu_pool, (x, weight, bias), True)
    x[1, 7, side - 1, side - 1] = bad  # the pool drops it if the side is odd
    y, grad_x, *_ = results(norm_relu_pool, (x, weight, bias), True)
    for found, before in ((y, clean[0]), (grad_x, clean[1])):
        assert found[1, 7].isnan().all()
        rest = torch.ones(3, 20, dtype=torch.bool)
        rest[1, 7] = False
        assert torch.equal(found[rest], before[rest])
    assert norm_relu_pool_reference(x, weight, bias)[1, 7].isnan().all()


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_any_number_of_threads(isa, monkeypatch):
    monkeypatch.setattr(native, "isa_index", lambda: isa)
    for shape, memory_format in product([(70, 24, 8, 8), (70, 24, 7, 5), (9, 24, 32, 32)], (CONTIGUOUS, LAST)):
        inputs = random_case(shape, memory_format=memory_format)
        found = []
        for threads in (1, 2, 3, 7):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found.append(results(norm_relu_pool, inputs, True))
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape_and_stride(data):
    images, channels = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 40))
    height, width = data.draw(st.integers(2, 40)), data.draw(st.integers(2, 40))
    kind = data.draw(st.sampled_from(["contiguous", "channels_last", "transposed", "sliced"]))
    pool, seed = data.draw(st.booleans()), data.draw(st.integers(0, 99))
    x, weight, bias = random_case((images, channels, height, width + (kind == "sliced")), seed=seed)
    if kind == "channels_last":
        x = x.contiguous(memory_format=LAST)
    x = x.transpose(2, 3) if kind == "transposed" else x[..., 1:] if kind == "sliced" else x
    found = results(norm_relu_pool, (x, weight, bias), pool)
    expected = results(norm_relu_pool_reference, [t.double() for t in (x, weight, bias)], pool)
    for result, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(result.double(), wanted, atol=5e-5, rtol=5e-5)
    assert (found[0] >= 0).all()


@pytest.mark.parametrize("shape", [(3, 20, 8, 8), (2, 3, 33, 35)])
def test_results_have_the_type_and_format_of_x(shape):
    for dtype, memory_format in product((torch.float32, torch.bfloat16, torch.float64), (CONTIGUOUS, LAST)):
        inputs = random_case(shape, dtype, memory_format)
        y, grad_x, of_weight, of_bias = results(norm_relu_pool, inputs, True)
        assert y.dtype == grad_x.dtype == dtype
        assert of_weight.dtype == of_bias.dtype == torch.float32
        assert y.is_contiguous(memory_format=memory_format)
        assert grad_x.is_contiguous(memory_format=memory_format)


def test_parameters_of_other_types_and_upstream_of_other_strides():
    x, weight, bias = random_case((3, 20, 8, 8))
    halves = weight.half(), bias.bfloat16()
    found = results(norm_relu_pool, (x, *halves), True)
    assert [g.dtype for g in found[2:]] == [torch.float16, torch.bfloat16]
    assert_close(found[:2], truth((x, *halves), True)[:2])
    x.requires_grad_()
    for grad_y in (torch.ones(()).expand(3, 20, 4, 4), torch.randn(3, 20, 4, 4).contiguous(memory_format=LAST)):
        found = [
            torch.autograd.grad(f(x, weight, bias), x, grad_y)[0] for f in (norm_relu_pool, norm_relu_pool_reference)
        ]
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    negated = torch.complex(x.detach(), -x.detach()).conj().imag
    assert negated.is_neg()
    assert torch.equal(norm_relu_pool(negated, weight, bias), norm_relu_pool(x.detach(), weight, bias))


@pytest.mark.parametrize("upstream", ["constant", "variable"])
@pytest.mark.parametrize("other_path", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_second_derivative_raises(upstream, other_path, dtype):
    """Also if the upstream gradient is a constant and another path alone would give a wrong gradient."""
    x, weight, bias = (t.to(dtype).requires_grad_() for t in random_case((2, 3, 4, 4)))
    for operator in (norm_relu_pool, lambda *inputs: module._operator(*inputs, 1e-5, True)[0]):
        y = operator(x, weight, bias)
        loss = y.sum() if upstream == "constant" else y.square().sum()
        with pytest.raises(RuntimeError, match=r"norm_relu_pool|autograd"):  # noqa: PT012, either of the two may raise
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            again = gradient.square().sum() + (x.pow(3).sum() if other_path else 0)
            torch.autograd.grad(again, x)
    with pytest.raises(RuntimeError):
        torch.func.hessian(lambda v: norm_relu_pool(v, weight.detach(), bias.detach()).sum())(x.detach())


def test_gradcheck_and_opcheck():
    inputs = [t.double().requires_grad_() for t in random_case((2, 3, 5, 4))]
    assert torch.autograd.gradcheck(norm_relu_pool, inputs)
    for memory_format in (CONTIGUOUS, LAST):
        x, weight, bias = random_case((2, 3, 5, 4), memory_format=memory_format)
        y, moments = module._operator(x, weight, bias, 1e-5, True)
        grad_y = torch.ones_like(y)
        torch.library.opcheck(module._gradient, (grad_y, x, weight, bias, moments, True))
        torch.library.opcheck(module._operator, (x.requires_grad_(), weight.requires_grad_(), bias, 1e-5, True))


def test_full_graph_equals_eager():
    """Traces forward and backward by torch.compile(fullgraph=True), without code generation."""

    def step(x, weight, bias, pool):
        return norm_relu_pool(x, weight, bias, pool=pool) * 2

    inputs = random_case((3, 5, 8, 8))
    traced = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(results(traced, inputs, True), results(step, inputs, True), strict=True):
        assert torch.equal(found, wanted)


def test_backward_saves_x_and_two_numbers_per_plane():
    x, weight, bias = random_case((4, 6, 8, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_relu_pool(x.requires_grad_(), weight, bias)
    assert sum(t.numel() for t in kept) == x.numel() + 2 * 6 + 2 * 4 * 6
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def test_training_step_equals_separate_layers():
    """One step of SGD for one block of the ConvNet. The gradient of the convolution's bias is only rounding noise."""
    x, weight, bias = random_case((4, 6, 8, 8))
    conv = nn.Conv2d(6, 6, 3, padding=1)
    parameters = (*conv.parameters(), weight.requires_grad_(), bias.requires_grad_())
    found = [
        torch.autograd.grad(operator(conv(x), weight, bias).square().mean(), parameters)
        for operator in (norm_relu_pool, norm_relu_pool_reference)
    ]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert found[0][1].abs().max() < 1e-6


@pytest.mark.parametrize("operator", [norm_relu_pool, norm_relu_pool_reference])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x: torch.float32 (2, 3, 4): expected floats [N, C, H, W]"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "x: torch.int64 (2, 3, 4, 4)"),
        ({"x": torch.zeros(2, 3, 1, 4)}, "H and W of 2 or more"),
        ({"weight": torch.zeros(4)}, "weight: torch.float32 (4,) on cpu: expected floats (3,) on cpu"),
        ({"bias": torch.zeros(3, device="meta")}, "bias: torch.float32 (3,) on meta: expected floats (3,) on cpu"),
        ({"eps": 0.0}, "eps: 0.0: expected more than 0"),
    ],
)
def test_wrong_use(operator, change, message):
    right = {"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(3), "bias": torch.zeros(3)}
    with pytest.raises(ValueError) as error:  # noqa: PT011, the message is compared below
        operator(**{**right, **change})
    assert message in str(error.value)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (28, 38)])  # small planes, and planes that use channels_last
def test_no_images(height, width):
    for memory_format, pool in product((CONTIGUOUS, LAST), (True, False)):
        inputs = random_case((0, 3, height, width), memory_format=memory_format)
        y, grad_x, of_weight, of_bias = results(norm_relu_pool, inputs, pool)
        assert y.shape == ((0, 3, height // 2, width // 2) if pool else (0, 3, height, width))
        assert grad_x.shape == inputs[0].shape
        assert torch.equal(torch.stack((of_weight, of_bias)), torch.zeros(2, 3))


def test_the_registered_gradient_returns_no_shared_memory(monkeypatch):
    """The Triton kernel's gradients of weight and bias are rows of one tensor. PyTorch refuses that of an operator."""
    from tadperf.kernels.ops import norm_relu_pool as module

    rows = torch.randn(2, 3)
    monkeypatch.setattr(module, "_backward", lambda grad_y, x, *_: (torch.zeros_like(x), *rows))
    x, moments = torch.randn(2, 3, 4, 4), torch.ones(2, 2, 3)
    results = torch.ops.tadperf.norm_relu_pool_gradient(torch.ones(2, 3, 2, 2), x, *torch.ones(2, 3), moments, True)
    assert [value.tolist() for value in results[1:]] == rows.tolist()
