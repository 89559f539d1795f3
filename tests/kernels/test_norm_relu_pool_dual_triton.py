"""The Triton kernels of norm_relu_pool_dual: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tadperf.config import MatchConfig, NetConfig
from tadperf.kernels import norm_relu_pool_gradient, norm_relu_pool_moments
from tadperf.kernels.gpu import launch_configs
from tadperf.kernels.ops import norm_relu_pool, norm_relu_pool_dual
from tadperf.kernels.ops.norm_relu_pool_dual import Affine, Dual

triton = pytest.importorskip("triton")
LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def on_triton(monkeypatch) -> Iterator[None]:
    """Makes both operators run their Triton kernels on CPU tensors, in chunks of 16 windows of 2 x 2 pixels."""
    monkeypatch.setattr(norm_relu_pool, "_compiled", lambda x: "cuda")
    monkeypatch.setattr(norm_relu_pool_dual, "_compiled", lambda x, affine, **others: "cuda")
    small = {"block": 64, "tile": 1024, "num_warps": 4}
    with launch_configs.override(lambda operator, size, config: small), np.errstate(all="ignore"):
        yield


def draw(shape, pool=True, dtype=torch.float32, memory_format=LAST, seed=0) -> tuple[Dual, Affine, Dual]:
    """Returns x, weight and bias, and the gradient of y, with their tangents. The affine is float32 or float64."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    pooled = (*shape[:2], shape[2] // 2, shape[3] // 2) if pool else shape
    x = Dual(*((normal(*shape) * 2 + 1).to(dtype).contiguous(memory_format=memory_format) for _ in "12"))
    affine = Affine(*(normal(shape[1]).to(torch.promote_types(dtype, torch.float32)) for _ in "1234"))
    return x, affine, Dual(*(normal(*pooled).to(dtype) for _ in "12"))


def results(x: Dual, affine: Affine, grad: Dual, pool: bool = True) -> list[Tensor]:
    y, moments = norm_relu_pool_dual.norm_relu_pool_dual(x, affine, 1e-5, pool)
    grad_x, *others = norm_relu_pool_dual.norm_relu_pool_dual_gradient(grad, x, affine, moments, pool)
    return [*y, moments, *grad_x, *others]


def truth(x: Dual, affine: Affine, grad: Dual, pool: bool = True) -> list[Tensor]:
    """Returns the results of plain PyTorch in float64, which test_norm_relu_pool_dual.py compares with torch.func."""
    wide_x, wide_grad = (Dual(*(t.double() for t in pair)) for pair in (x, grad))
    wide = Affine(*(t.double() for t in affine))
    y, moments = norm_relu_pool_dual.norm_relu_pool_dual_reference(wide_x, wide, 1e-5, pool)
    others = norm_relu_pool_dual.norm_relu_pool_dual_gradient_reference(wide_grad, wide_x, wide, moments, pool)
    return [*y, moments, *others[0], *others[1:]]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Compares errors with the largest value of a result."""
    for result, wanted in zip(found, expected, strict=True):
        assert result.shape == wanted.shape
        error = (result.double() - wanted).abs()
        assert not error.numel() or float(error.max()) <= tolerance * max(1.0, float(wanted.abs().max()))


SHAPES = [
    ((2, 6, 5, 7), True),
    ((2, 20, 8, 5), False),
    ((1, 1, 3, 3), True),
    ((2, 3, 2, 2), True),
    ((2, 3, 1, 1), False),
    ((0, 3, 4, 4), True),
    ((1, 2, 11, 9), True),
    ((1, 40, 4, 4), True),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, LAST])
@pytest.mark.parametrize(("shape", "pool"), SHAPES)
def test_against_float64(shape, pool, memory_format, on_triton):
    for dtype in TOLERANCE if shape[1] == 6 else [torch.float32]:
        x, affine, grad = draw(shape, pool, dtype, memory_format)
        found = results(x, affine, grad, pool)
        assert [t.dtype for t in found] == [dtype] * 2 + [affine.weight.dtype] + [dtype] * 2 + [affine.weight.dtype] * 2
        for result in (*found[:2], *found[3:5]):
            assert result.is_contiguous(memory_format=memory_format) or not len(result)
        assert_close(found, truth(x, affine, grad, pool), TOLERANCE[dtype])


@pytest.mark.interpreter
def test_any_strides_and_types_of_the_inputs(on_triton):
    """Value and tangent may have other formats. The gradient of y may have another format than x."""
    x, affine, grad = draw((2, 6, 6, 5))
    expected = results(x, affine, grad)
    mixed = Dual(x.value, x.dot.contiguous()), Affine(*(torch.stack([t, t], 1)[:, 0] for t in affine))
    for other in (
        Dual(*(g.contiguous(memory_format=LAST) for g in grad)),
        Dual(grad.value, grad.dot.mT.contiguous().mT),
    ):
        assert all(torch.equal(a, b) for a, b in zip(results(*mixed, other), expected, strict=True))
    half = Affine(*(t.half() for t in affine))
    assert_close(results(x, half, grad), truth(x, half, grad), 1e-3)
    assert [t.dtype for t in results(x, half, grad)[5:]] == [torch.float16] * 2


@pytest.mark.interpreter
@pytest.mark.parametrize("pool", [True, False])
def test_constant_planes_offsets_and_values_that_are_not_finite(pool, on_triton):
    x, affine, grad = draw((3, 5, 6, 7), pool)
    affine.bias[4] = 3
    x.value[0, 1], x.value[1, 0] = 3.3e6, x.value[1, 0] + 1e4
    x.value[2, 3, 5, 6], x.dot[2, 4, 0, 0] = torch.inf, torch.nan  # the pool drops the first of the two
    found, expected = results(x, affine, grad, pool), truth(x, affine, grad, pool)
    clean = torch.ones(3, 5, dtype=torch.bool)
    clean[2, 3], clean[2, 4], clean[1, 0], clean[0, 1] = False, False, False, False
    for result, wanted in zip(found[:2] + found[3:5], expected[:2] + expected[3:5], strict=True):
        assert_close([result[clean]], [wanted[clean]], 5e-6)
        assert_close([result[1, 0]], [wanted[1, 0]], 3e-3)  # x itself has an error of 1e4 * 2^-24 there
        assert result[0, 1].isfinite().all()
        assert result[2, 3].isnan().all()
    assert found[1][2, 4].isnan().any()
    assert found[4][2, 4].isnan().all()
    assert found[0][2, 4].isfinite().all()
    assert torch.equal(found[0][0, 1], affine.bias[1].relu().expand_as(found[0][0, 1]))
    assert found[2][3, 0, 1] == 0  # a constant plane has no product with its tangent


@pytest.mark.interpreter
def test_moments_are_exact_with_an_outlier_in_the_first_pixel(on_triton):
    """The bound is that of the native form. Errors of means are in standard deviations, other errors are relative."""
    x, affine, _ = draw((2, 4, 16, 16))
    x.value[..., 0, 0] = 200  # 100 standard deviations
    _, moments = norm_relu_pool_dual.norm_relu_pool_dual(x, affine)
    exact = Dual(*(t.double() for t in x)), Affine(*(t.double() for t in affine))
    _, wanted = norm_relu_pool_dual.norm_relu_pool_dual_reference(*exact)
    error = (moments - wanted).abs() / torch.stack(
        [1 / wanted[1], wanted[1], 1 / wanted[1], torch.ones_like(wanted[1])]
    )
    assert float(error.max()) < 2e-6, error.amax((1, 2)).tolist()


@pytest.mark.interpreter
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_results_are_linear_in_the_tangents_and_independent_of_other_images(data, on_triton):
    shape = tuple(data.draw(st.integers(low, high)) for low, high in ((2, 3), (1, 5), (2, 8), (2, 8)))
    pool, memory_format = data.draw(st.booleans()), data.draw(st.sampled_from([LAST, CONTIGUOUS]))
    x, affine, grad = draw(shape, pool, memory_format=memory_format, seed=data.draw(st.integers(0, 99)))
    y, y_dot, moments, grad_x, grad_x_dot, grad_w_dot, grad_b_dot = results(x, affine, grad, pool)
    doubled = Affine(*affine[:2], 2 * affine.weight_dot, 2 * affine.bias_dot)
    found = results(Dual(x.value, 2 * x.dot), doubled, Dual(grad.value, 2 * grad.dot), pool)
    moments = moments * torch.tensor([1, 1, 2, 2])[:, None, None]
    expected = y, 2 * y_dot, moments, grad_x, 2 * grad_x_dot, 2 * grad_w_dot, 2 * grad_b_dot
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    alone = results(Dual(*(t[1:2] for t in x)), affine, Dual(*(t[1:2] for t in grad)), pool)
    for batched, single in zip((y, y_dot, grad_x, grad_x_dot), (*alone[:2], *alone[3:5]), strict=True):
        assert torch.equal(batched[1:2], single)


@pytest.mark.interpreter
def test_the_value_is_that_of_norm_relu_pool(on_triton):
    """Also for norm_relu_pool, the gradient of y may have another format than x."""
    x, affine, grad = draw((2, 6, 5, 7))
    y, moments = norm_relu_pool_moments(x.value, *affine[:2])
    found = [y, moments, norm_relu_pool_gradient(grad.value, x.value, *affine[:2], moments)[0]]
    expected = results(x, affine, grad)
    assert_close(found, [expected[0].double(), expected[2][:2].double(), expected[3].double()], 2e-6)


@pytest.mark.interpreter
def test_y_and_y_dot_are_the_halves_of_one_tensor(on_triton):
    x, affine, grad = draw((3, 4, 6, 6))
    y, moments = norm_relu_pool_dual.norm_relu_pool_dual(x, affine)
    grad_x, *_ = norm_relu_pool_dual.norm_relu_pool_dual_gradient(grad, x, affine, moments)
    for first, second in ((y.value, y.dot), (grad_x.dot, grad_x.value)):
        joined = norm_relu_pool_dual.join(first, second)
        assert joined.data_ptr() == first.data_ptr()
        assert torch.equal(joined, torch.cat([first, second]))


@pytest.mark.interpreter
def test_the_matching_gradient_equals_the_unroll_in_float64(on_triton):
    from tadperf.matching.gradient import adjoint, unroll
    from tadperf.matching.step_backends import eager
    from tadperf.matching.trajectories import draw_steps
    from tadperf.nets.architectures import build
    from tadperf.nets.flat import FlatNet

    random = torch.Generator().manual_seed(0)
    config, count = NetConfig(depth=2, width=4), 4
    steps = draw_steps(MatchConfig(steps=2, batch=3), count, 8, "none", random).split()
    nets = [FlatNet(build(config, (3, 8, 8), 4, 3).to(dtype)) for dtype in (torch.float32, torch.float64)]
    start = nets[0].flatten()
    target = start + 0.02 * torch.randn(start.shape, generator=random)
    images = torch.randn(count, 3, 8, 8, generator=random)
    labels, lr = torch.randn(count, 4, generator=random), torch.tensor(0.1)
    backend = eager(nets[0])
    assert backend.name == "formulas"
    found = adjoint(nets[0], start, target, images, labels, lr, steps, backend=backend)
    start, target, images, labels, lr = (t.double() for t in (start, target, images, labels, lr))
    expected = unroll(nets[1], start, target, images, labels, lr, steps)
    for name in ("loss", "images", "labels", "lr", "end"):
        ours, wanted = getattr(found, name), getattr(expected, name)
        assert float((ours - wanted).norm()) < 1e-5 * float(wanted.norm()), name


SIZES = dict.fromkeys(("n_planes", "n_channels", "height", "width"), "i32")
CHANNEL = ("weight_ptr", "bias_ptr", "weight_dot_ptr", "moments_ptr")
FORWARD_MAPS = ("x_ptr", "x_dot_ptr", "y_ptr", "y_dot_ptr")
BACKWARD_MAPS = ("grad_ptr", "grad_dot_ptr", "x_ptr", "x_dot_ptr", "grad_x_ptr", "grad_x_dot_ptr")


@pytest.mark.parametrize(
    ("name", "last", "entry"),
    [*(("fp32", True, i) for i in range(4)), ("bf16", True, 2), ("fp32", False, 2)],
)
def test_compiles_without_spills_and_reads_a_plane_once(aot, name, last, entry):
    """A thread loads its values of a plane once if the plane fits into one chunk, 4 at a time in channels_last."""
    from tadperf.kernels.gpu import norm_relu_pool_dual as kernels

    how = launch_configs.shipped("norm_relu_pool_dual_channels_last" if last else "norm_relu_pool_dual")[entry]
    chunks = 3 if last and how["up_to"] is None else 1
    constants = {"PLANES": how["tile"] // how["block"], "BLOCK": how["block"] // 4, "CHUNKS": chunks}
    constants |= {"WINDOW": 2, "LAST": last}
    common = dict.fromkeys(CHANNEL, "*fp32") | SIZES
    forward = dict.fromkeys(FORWARD_MAPS, f"*{name}") | common | {"bias_dot_ptr": "*fp32"}
    backward = dict.fromkeys(BACKWARD_MAPS, f"*{name}") | common | {"partial_ptr": "*fp32"}
    values = how["tile"] // (32 * how["num_warps"])  # of one map in a thread
    for kernel, signature, more, maps, vectors in (
        (kernels.dual_forward_kernel, forward, {"EPS": 1e-5}, 2 * values, 4),
        (kernels.dual_backward_kernel, backward, {"GRAD_LAST": last}, 2 * values + values // 2, 7),
    ):
        backend = None if chunks == 1 else "cuda"  # gfx942 spills 25 registers if there are several chunks
        found = aot(kernel, signature, constants | more, backend, aligned=True, num_warps=how["num_warps"])
        assert {target: used.spills for target, used in found.items()} == dict.fromkeys(found, 0)
        if chunks == 1 and name == "fp32":  # and each vector [C] by one load or two
            rest = [used.loads - maps // (4 if last else 1) for used in found.values() if used.loads]
            assert vectors <= min(rest) <= max(rest) <= 2 * vectors
