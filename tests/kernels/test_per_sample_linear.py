from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tadperf.kernels import (
    native,
    per_sample_linear,
    per_sample_linear_reference,
    per_sample_reference,
)
from tadperf.kernels.ops.per_sample_linear import _gradient, _operator

INF, NAN = float("inf"), float("nan")
HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(0, 3, 2), (1, 2, 1), (7, 3, 5), (300, 10, 64), (129, 127, 33), (3, 1025, 17), (4097, 2, 3), (5, 3000, 252)]
operators = pytest.mark.parametrize("operator", [per_sample_linear, per_sample_linear_reference])
needs_native = pytest.mark.skipif(not native.available(), reason=native.reason())


def random_case(samples, classes, depth, dtype=torch.float32):
    random = torch.Generator().manual_seed(samples + classes + depth)
    features = torch.randn(samples, depth, generator=random).to(dtype)
    weight, bias = torch.randn(classes, depth, generator=random).to(dtype), torch.randn(classes, generator=random)
    return features, weight, torch.randint(-1, classes, (samples,), generator=random), bias.to(dtype)


def truth(features, weight, labels, bias=None):
    """Returns the results of float64 logits by the reference, which test_per_sample.py compares with SciPy."""
    logits = features.double() @ weight.double().t() + (0 if bias is None else bias.double())
    return per_sample_reference(logits, labels)


def gradients(operator, features, weight, labels, bias):
    """Returns the gradients of a weighted sum of the losses for features, weight and bias."""
    operands = f, w, b = [t.detach().clone().requires_grad_() for t in (features, weight, bias)]
    loss = operator(f, w, labels, b).loss
    return torch.autograd.grad((loss * torch.linspace(-1, 2, len(labels), dtype=loss.dtype)).sum(), operands)


def error(found, wanted):
    return max(((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True) if a.numel()), default=0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("with_bias", [False, True])
def test_against_float64(shape, dtype, with_bias):
    """Also for half types: their products are summed in float32, and no logit is rounded."""
    features, weight, labels, bias = random_case(*shape, dtype=dtype)
    bias = bias if with_bias else None
    wanted, results = truth(features, weight, labels, bias), per_sample_linear(features, weight, labels, bias)
    rival = per_sample_linear_reference(features, weight, labels, bias)
    assert [r.dtype for r in results] == [torch.float32] * 2 + [torch.int64] + [torch.float32] * 2
    assert error(results, wanted) <= 1.5 * error(rival, wanted) + 5e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_gradients_against_float64(shape, dtype, tolerance):
    features, weight, labels, bias = random_case(*shape, dtype=dtype)
    wanted = gradients(per_sample_linear_reference, features.double(), weight.double(), labels, bias.double())
    found = gradients(per_sample_linear, features, weight, labels, bias)
    assert [g.dtype for g in found] == [dtype] * 3
    for gradient, exact in zip(found, wanted, strict=True):
        scale = exact.abs().max().item() if exact.numel() else 0
        torch.testing.assert_close(gradient.double(), exact, atol=tolerance * max(scale, 1), rtol=0)


@operators
@pytest.mark.parametrize("labels", [[250, 3, 7, 299], [-1, -1, -1, -1]])
def test_hard_values(operator, labels):
    """Ties, classes of probability 0 (a bias of -inf) and undefined rows give the results of the stored logits."""
    features, weight, bias = torch.eye(4), torch.zeros(2100, 4), torch.zeros(2100)
    weight[[100, 1250], 0] = 1
    bias[:200] = -INF
    results = operator(features, weight, torch.tensor(labels), bias)
    assert results.prediction.tolist() == [1250, 200, 200, 200]
    weight[:, 2] = INF
    weight[2000, 3] = NAN
    for got, logits in zip(
        operator(features, weight, torch.tensor(labels), bias),
        per_sample_reference(features @ weight.t() + bias, torch.tensor(labels)),
        strict=True,
    ):
        torch.testing.assert_close(got, logits, equal_nan=True)
    nothing = operator(features, torch.zeros(2100, 4), torch.tensor(labels), torch.full((2100,), -INF))
    assert nothing.prediction.tolist() == [-1] * 4


@needs_native
@pytest.mark.parametrize("classes", [10, 3000])
def test_same_bits_for_any_number_of_threads_given_the_logits(classes):
    """With small integers every sum of products is exact, in any order."""
    random = torch.Generator().manual_seed(0)
    features, weight = (torch.randint(-2, 3, (n, 16), generator=random).float() for n in (9000, classes))
    labels = torch.randint(classes, (9000,), generator=random)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(per_sample_linear(features, weight, labels))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape_and_stride(data):
    batch = data.draw(st.lists(st.integers(0, 4), max_size=3), label="batch shape")
    classes, depth = data.draw(st.integers(2, 20), label="classes"), data.draw(st.integers(1, 9), label="depth")
    step = data.draw(st.integers(1, 3), label="stride")
    dtype = data.draw(st.sampled_from([torch.float32, *HALVES, torch.float64]), label="dtype")
    label_dtype = data.draw(st.sampled_from([torch.int32, torch.int64]), label="label type")
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    features = torch.randn(*batch, depth * step, generator=random).to(dtype)[..., ::step]
    weight = torch.randn(depth, classes, generator=random).to(dtype).t()
    bias = torch.randn(classes, step, generator=random).to(dtype)[:, 0]
    labels = torch.randint(-1, classes, batch, generator=random, dtype=label_dtype)
    results = per_sample_linear(features, weight, labels, bias)
    assert all(r.shape == labels.shape for r in results)
    loss, confidence, _, margin, entropy = results
    wanted = truth(features, weight, labels, bias)
    for found, exact in zip((loss, confidence, margin, entropy), (*wanted[:2], *wanted[3:]), strict=True):
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)


WRONG = [
    (
        {"features": torch.zeros(3, 4, dtype=torch.int64)},
        "features: torch.int64 (3, 4) on cpu: expected floats [..., D]",
    ),
    ({"weight": torch.zeros(5, 3)}, "weight: torch.float32 (5, 3) on cpu: expected torch.float32 (C, 4)"),
    ({"weight": torch.zeros(5, 4).half()}, "weight: torch.float16 (5, 4) on cpu: expected torch.float32 (C, 4)"),
    ({"weight": torch.zeros(1, 4)}, "weight: torch.float32 (1, 4) on cpu: expected torch.float32 (C, 4) with C of 2"),
    ({"labels": torch.zeros(3)}, "labels: torch.float32 (3,) on cpu: expected int32 or int64 (3,)"),
    ({"labels": torch.tensor([0, 5, -2])}, "labels: 5 at sample 1: expected 0 to 4, or -1 to ignore"),
    ({"bias": torch.zeros(4)}, "bias: torch.float32 (4,) on cpu: expected torch.float32 (5,)"),
    ({"weight": torch.zeros(5, 4, device="meta")}, "on meta: expected cpu, like the features"),
]


@operators
@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_use(operator, change, message):
    right = {"features": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError) as raised:  # noqa: PT011, the message is compared below
        operator(**{**right, **change})
    assert message in str(raised.value)


def test_gradcheck():
    features, weight, labels, bias = random_case(5, 4, 3, torch.float64)
    operands = [t.requires_grad_() for t in (features, weight, bias)]
    assert torch.autograd.gradcheck(lambda f, w, b: per_sample_linear(f, w, labels, b).loss, operands)


def test_only_the_loss_has_a_gradient():
    features, weight, labels, _ = random_case(6, 5, 4)
    loss, *others = per_sample_linear(features, weight.requires_grad_(), labels)
    assert loss.requires_grad
    assert not any(r.requires_grad for r in others)
    with torch.no_grad():
        assert not per_sample_linear(features, weight, labels).loss.requires_grad


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    features, weight, labels, bias = random_case(6, 5, 4, dtype)
    *results, top = _operator(features, weight, labels, bias)
    torch.library.opcheck(_operator, (features.requires_grad_(), weight.requires_grad_(), labels, bias))
    parts = features.detach(), weight.detach(), labels, bias, top, results[1], results[0]
    torch.library.opcheck(_gradient, parts)


def test_full_graph_equals_eager():
    def step(features, weight, labels, bias):
        return (per_sample_linear(features * 2, weight, labels, bias).loss * features.square().mean(1)).sum()

    features, weight, labels, bias = random_case(30, 10, 8)
    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        operands = f, w, b = [t.clone().requires_grad_() for t in (features, weight, bias)]
        function(f, w, labels, b).backward()
        found.append([t.grad for t in operands])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


MEMORY = """
import resource, sys, torch
from tadperf.kernels import per_sample_linear

dtype = getattr(torch, sys.argv[1])
torch.set_num_threads(1)
features, weight = torch.randn(1000, 64).to(dtype), torch.randn(20_000, 64).to(dtype)
labels = torch.randint(20_000, (1000,))
small = [t[:64].clone() for t in (features, weight)], labels[:64] % 64

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

per_sample_linear(*small[0], small[1])  # the matrix library's own buffers
warm = [t.requires_grad_() for t in small[0]]
torch.autograd.grad(per_sample_linear(*warm, small[1]).loss.sum(), warm)
before = peak()
per_sample_linear(features, weight, labels)
forward = peak() - before
operands = features.requires_grad_(), weight.requires_grad_()
torch.autograd.grad(per_sample_linear(*operands, labels).loss.sum(), operands)
print(forward, peak() - before)
"""


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in kB")
@pytest.mark.parametrize(("dtype", "results_and_gradients"), [("float32", 6), ("bfloat16", 9)])
def test_memory_does_not_hold_the_logits(dtype, results_and_gradients):
    """1000 x 20 000 logits in float32 take 80 MB, and their gradient as much again. All limits are in MB."""
    command = [sys.executable, "-c", MEMORY, dtype]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    forward, both = map(float, result.stdout.split())
    packed = 8  # buffers of the matrix library
    assert forward <= 8 + packed
    assert both <= 8 + packed + results_and_gradients
