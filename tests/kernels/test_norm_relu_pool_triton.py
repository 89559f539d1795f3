"""The Triton kernels of norm_relu_pool: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tadperf.kernels import norm_relu_pool_reference
from tadperf.kernels.gpu import launch_configs

pytest.importorskip("triton")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


@pytest.mark.interpreter
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, LAST])
@pytest.mark.parametrize(
    ("shape", "pool"),
    [
        ((2, 3, 2, 2), True),
        ((1, 1, 3, 5), True),
        ((3, 5, 7, 7), True),
        ((2, 20, 8, 8), False),
        ((1, 2, 33, 35), True),
        ((2, 3, 1, 1), False),
        ((0, 3, 4, 4), True),
        ((1, 40, 4, 4), True),
        ((1, 2, 17, 16), False),
    ],
)
def test_against_float64(shape, pool, memory_format):
    from tadperf.kernels.gpu import norm_relu_pool as triton_kernels

    random = torch.Generator().manual_seed(0)
    for dtype in TYPES.values() if shape[-1] == 7 else [torch.float32]:
        x = (torch.randn(shape, generator=random) * 2 + 1).to(dtype).contiguous(memory_format=memory_format)
        weight, bias = torch.randn(2, shape[1], generator=random)
        exact = [t.double().requires_grad_() for t in (x, weight, bias)]
        expected = norm_relu_pool_reference(exact[0], exact[1], exact[2], pool=pool)
        with np.errstate(all="ignore"):
            y, moments = triton_kernels.norm_relu_pool(x, weight, bias, 1e-5, pool)
            grad_y = torch.empty_like(y).copy_(torch.randn(y.shape, generator=random))
            grads = triton_kernels.norm_relu_pool_gradient(grad_y, x, weight, bias, moments, pool)
        tolerance = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
        assert y.is_contiguous(memory_format=LAST if not x.is_contiguous() else CONTIGUOUS)
        assert grads[0].stride() == x.stride()
        wanted = torch.autograd.grad(expected, exact, grad_y.double())
        for result, truth in zip((y, *grads), (expected, *wanted), strict=True):
            torch.testing.assert_close(result.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.interpreter
def test_nan_and_constant_planes():
    from tadperf.kernels.gpu import norm_relu_pool as triton_kernels

    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    x[0, 1, 4, 5], x[1, 0, 0, 0], x[1, 2] = float("nan"), float("inf"), 3.3e6
    weight, bias = torch.ones(3), torch.tensor([0.1, 0.2, 0.3])
    with np.errstate(all="ignore"):
        y, _ = triton_kernels.norm_relu_pool(x, weight, bias, 1e-5, True)
    torch.testing.assert_close(y, norm_relu_pool_reference(x.double(), weight, bias).float(), equal_nan=True)
    assert torch.equal(y[1, 2], torch.full((2, 3), 0.3))


@pytest.mark.parametrize(
    ("name", "last", "entry"), [*(("fp32", True, i) for i in range(4)), ("bf16", True, 2), ("fp32", False, 2)]
)
def test_compiles_without_spills_and_reads_a_plane_once(aot, name, last, entry):
    """A thread loads its values of a plane once if the plane fits into one chunk, 4 at a time in channels_last."""
    from tadperf.kernels.gpu import norm_relu_pool as triton_kernels

    sizes = dict.fromkeys(("n_planes", "n_channels", "height", "width"), "i32")
    channel = {"weight_ptr": "*fp32", "bias_ptr": "*fp32", "moments_ptr": "*fp32"}
    forward = {"x_ptr": f"*{name}", "y_ptr": f"*{name}", **channel, **sizes, "eps": "fp32"}
    backward = {
        "grad_y_ptr": f"*{name}",
        "x_ptr": f"*{name}",
        "grad_x_ptr": f"*{name}",
        "partial_ptr": "*fp32",
        **channel,
        **sizes,
    }
    how = launch_configs.shipped("norm_relu_pool_channels_last" if last else "norm_relu_pool")[entry]
    chunks = 3 if last and how["up_to"] is None else 1
    constants = {"PLANES": how["tile"] // how["block"], "BLOCK": how["block"] // 4, "WINDOW": 2}
    constants |= {"LAST": last, "CHUNKS": chunks}
    values = how["tile"] // (32 * how["num_warps"])  # of one map in a thread
    for kernel, signature, more, maps, vectors in (
        (triton_kernels.forward_kernel, forward, {}, values, 2),
        (triton_kernels.backward_kernel, backward, {"GRAD_LAST": last}, values + values // 4, 4),
    ):
        found = aot(kernel, signature, constants | more, aligned=True, num_warps=how["num_warps"])
        assert {target: used.spills for target, used in found.items()} == dict.fromkeys(found, 0)
        if chunks == 1 and name == "fp32":  # and each vector [C] by one load or two
            rest = [used.loads - maps // (4 if last else 1) for used in found.values() if used.loads]
            assert vectors <= min(rest) <= max(rest) <= 2 * vectors
