from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from tadperf.kernels import native, per_sample, per_sample_reference
from tadperf.kernels.ops.per_sample import _gradient, _operator, empty_results, fill_native, loss_gradient

INF, NAN = float("inf"), float("nan")
compiled = native.module()
ISAS = range(len(compiled.isas())) if compiled else ()
needs_native = pytest.mark.skipif(compiled is None, reason=native.reason())


def truth(logits, labels):
    """Returns the five results in float64 by NumPy and SciPy, for finite logits [N, C]."""
    x, y = logits.double().numpy(), labels.numpy()
    p, log_p = softmax(x, -1), log_softmax(x, -1)
    ordered = np.sort(p, -1)
    loss = np.where(y >= 0, -log_p[np.arange(len(y)), y], 0)
    return loss, ordered[:, -1], x.argmax(-1), ordered[:, -1] - ordered[:, -2], -(p * log_p).sum(-1)


def random_case(rows, classes, seed=0, scale=3.0, label_dtype=torch.int64):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=random) * scale
    return logits, torch.randint(-1, classes, (rows,), generator=random, dtype=label_dtype)


def run_native(logits, labels, isa, threads):
    """Runs the compiled operator with an instruction set (an index) and a number of threads."""
    out = empty_results(labels)
    fill_native(logits, labels, out, isa=isa, threads=threads)
    return out


def assert_close(results, expected, atol=1e-6, rtol=1e-6):
    for result, wanted in zip(results, expected, strict=True):
        wanted = torch.as_tensor(wanted)
        torch.testing.assert_close(result.to(wanted.dtype), wanted, atol=atol, rtol=rtol, equal_nan=True)


def same_bits(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


SHAPES = [(0, 10), (1, 2), (3, 2), (7, 3), (16, 4), (33, 10), (65, 31), (9, 127), (9, 128), (9, 129), (9, 507)]


@pytest.mark.parametrize(("rows", "classes"), SHAPES)
@pytest.mark.parametrize("operator", [per_sample, per_sample_reference])
def test_against_float64(operator, rows, classes):
    logits, labels = random_case(rows, classes)
    results = operator(logits, labels)
    assert [r.dtype for r in results] == [torch.float32] * 2 + [torch.int64] + [torch.float32] * 2
    assert_close(results, truth(logits, labels), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("classes", [10, 1000, 200_000])
def test_no_less_accurate_than_pytorch(classes, scale):
    """Our error against float64 is at most that of PyTorch in float32, plus 5e-6."""
    logits, labels = random_case(5, classes, scale=scale)
    expected = [torch.as_tensor(t) for t in truth(logits, labels)]
    ours, theirs = per_sample(logits, labels), per_sample_reference(logits, labels)
    for result, rival, wanted in zip(ours, theirs, expected, strict=True):
        assert (result - wanted).abs().max() <= (rival - wanted).abs().max() + 5e-6


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_exponential_and_logarithm_to_a_few_ulp(isa):
    """With logits 0 and -d, confidence is 1 / (1 + exp(-d)), loss log(1 + exp(-d)) and margin tanh(d / 2)."""
    d = torch.linspace(0, 100, 20_001)
    logits = torch.stack([torch.zeros_like(d), -d], 1)
    loss, confidence, _, margin, _ = run_native(logits, torch.zeros(len(d), dtype=torch.int64), isa, 1)
    e = np.exp(-d.double().numpy())
    ulp = 2.0**-23
    np.testing.assert_allclose(confidence.numpy(), 1 / (1 + e), rtol=2 * ulp)
    np.testing.assert_allclose(loss.numpy(), np.log1p(e), rtol=2 * ulp, atol=ulp)
    np.testing.assert_allclose(margin.numpy(), (1 - e) / (1 + e), rtol=0, atol=2 * ulp)


HARD_ROWS = [
    # logits, label, (loss, confidence, prediction, margin, entropy)
    ([0, 0, 0], 0, (np.log(3), 1 / 3, 0, 0, np.log(3))),
    ([1, -INF, 1], 0, (np.log(2), 0.5, 0, 0, np.log(2))),
    ([1, -INF, 1], 1, (INF, 0.5, 0, 0, np.log(2))),
    ([-INF, 5, -INF], 1, (0, 1, 1, 1, 0)),
    ([-INF, -INF, -INF], 0, (NAN, NAN, -1, NAN, NAN)),
    ([INF, 0, 0], 0, (NAN, NAN, -1, NAN, NAN)),
    ([0, NAN, 0], 0, (NAN, NAN, -1, NAN, NAN)),
    ([0, 0, NAN], -1, (0, NAN, -1, NAN, NAN)),
    ([3e38, -3e38, 0], 2, (3e38, 1, 0, 1, 0)),
    ([2, 5, 5], -1, (0, None, 1, 0, None)),
    ([-1000, 0, 0], 0, (1000 + np.log(2), 0.5, 1, 0, np.log(2))),
]


@pytest.mark.parametrize("operator", [per_sample, per_sample_reference])
@pytest.mark.parametrize("width", [3, 11, 300])
@pytest.mark.parametrize(("row", "label", "expected"), HARD_ROWS)
def test_hard_values(operator, width, row, label, expected):
    """Alone, and with classes of probability 0 on both sides. Ordinary rows beside the hard one must not change."""
    before = (width - 3) // 2
    x = torch.tensor([-INF] * before + row + [-INF] * (width - 3 - before))
    logits, labels = random_case(20, width)
    logits[13], labels[13] = x, label + before if label >= 0 else label
    clean, _ = random_case(20, width)
    results, others = operator(logits, labels), operator(clean, labels)
    for name, value in zip(results._fields, expected, strict=True):
        value = value + before if name == "prediction" and value >= 0 else value
        if value is not None:
            assert getattr(results, name)[13].item() == pytest.approx(value, rel=1e-6, abs=1e-7, nan_ok=True), name
    rest = torch.arange(20) != 13
    assert same_bits([r[rest] for r in results], [r[rest] for r in others])


@pytest.mark.parametrize("operator", [per_sample, per_sample_reference])
@pytest.mark.parametrize("classes", [2, 9, 130, 1000])
def test_lowest_index_among_equals(operator, classes):
    logits = torch.zeros(12, classes)
    logits[1:, classes // 2 :] = 1
    results = operator(logits, torch.zeros(12, dtype=torch.int64))
    assert results.prediction.tolist() == [0] + [classes // 2] * 11
    assert results.margin[0] == 0
    if classes > 2:
        assert (results.margin == 0).all()


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_any_number_of_threads(isa):
    logits, labels = random_case(5000, 37)
    one = run_native(logits, labels, isa, 1)
    for threads in (2, 3, 7):
        assert same_bits(one, run_native(logits, labels, isa, threads))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "classes"), [*SHAPES, (3, 200_000)])
def test_every_instruction_set(isa, rows, classes):
    logits, labels = random_case(rows, classes)
    assert_close(run_native(logits, labels, isa, 1), truth(logits, labels), atol=1e-5, rtol=1e-6)


@needs_native
def test_instruction_set_and_reference_can_be_forced():
    """Sets environment variables, which are read when an operator is first used."""
    script = "from tadperf.kernels import native, implementations as i; print(native.isa(), i()['per_sample']['cpu'])"

    def run(**variables):
        env = {**os.environ, **variables}
        return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)

    with ThreadPoolExecutor() as pool:  # each process takes seconds to import torch
        baseline = pool.submit(run, TADPERF_ISA="baseline")
        reference = pool.submit(run, TADPERF_KERNELS="reference")
        unknown = pool.submit(run, TADPERF_KERNELS="plain")
        wrong = pool.submit(run, TADPERF_ISA="mmx").result()
    assert baseline.result().stdout.split() == ["baseline", "native"]
    assert reference.result().stdout.split() == ["None", "reference"]
    assert wrong.returncode != 0
    assert "TADPERF_ISA: mmx: this machine supports baseline" in wrong.stderr
    assert "TADPERF_KERNELS: plain: must be reference, or not set" in unknown.result().stderr


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_stride_and_label(data):
    batch = data.draw(st.lists(st.integers(0, 5), max_size=3), label="batch shape")
    classes = data.draw(st.integers(2, 40), label="classes")
    step, offset = data.draw(st.integers(1, 3), label="class stride"), data.draw(st.integers(0, 3), label="offset")
    transposed = data.draw(st.booleans(), label="transposed")
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]), label="label type")
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    whole = torch.randn(*batch, classes * step + offset, generator=random)
    logits = whole[..., offset::step]
    if transposed and len(batch) >= 2:
        logits = logits.transpose(0, 1)
    labels = torch.randint(-1, classes, (*logits.shape[:-1], 2), generator=random, dtype=dtype)[..., 0]
    results = per_sample(logits, labels)
    assert all(r.shape == labels.shape for r in results)
    flat = truth(logits.reshape(-1, classes), labels.reshape(-1).long())
    assert_close([r.reshape(-1) for r in results], flat)
    loss, confidence, _, margin, entropy = results
    assert (loss >= 0).all()
    assert ((confidence <= 1) & (confidence > 0)).all()
    assert ((margin >= 0) & (margin <= confidence)).all()
    assert ((entropy >= 0) & (entropy <= np.log(classes) + 1e-5)).all()


def test_float64_is_computed_in_float64():
    logits, labels = random_case(50, 10)
    results = per_sample(logits.double(), labels)
    assert results.loss.dtype == torch.float64
    assert_close(results, truth(logits.double(), labels), atol=1e-12, rtol=1e-12)


def every_half(dtype):
    """Returns all 65536 values of a half type, in rows of four and in a single row."""
    values = torch.arange(65536).sub(32768).to(torch.int16).view(dtype)
    return values.view(-1, 4), values.view(1, -1)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_read_exactly(isa, dtype):
    """Every value, also NaNs, infinities and denormals, gives the bits of the same value in float32."""
    cases = [random_case(rows, classes) for rows, classes in [*SHAPES, (5, 1), (40, 5)] if classes > 1]
    cases += [(values, torch.arange(len(values)) % values.shape[1]) for values in every_half(dtype)]
    for logits, labels in cases:
        halves = logits.to(dtype)
        assert same_bits(run_native(halves, labels, isa, 1), run_native(halves.float(), labels, isa, 1))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_use_compiled_code_with_any_stride(dtype):
    logits, labels = random_case(40, 24)
    expected = per_sample(logits[:, ::2].to(dtype).float(), labels % 12)
    assert same_bits(per_sample(logits.to(dtype)[:, ::2], labels % 12), expected)
    assert same_bits(per_sample(logits[:, ::2].to(dtype).t().contiguous().t(), labels % 12), expected)


@needs_native
def test_negated_views_and_other_defaults():
    """A lazily negated view is read with its sign. The default type and device change no result."""
    logits, labels = random_case(20, 10)
    negated = torch.complex(logits, -logits).conj().imag
    assert negated.is_neg()
    expected = per_sample(logits, labels)
    assert same_bits(per_sample(negated, labels), expected)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert same_bits(per_sample(logits, labels), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("operator", [per_sample, per_sample_reference])
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), "logits: torch.float32 (3, 1): expected floats"),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), "logits: torch.int64 (3, 4)"),
        (
            torch.zeros(3, 4),
            torch.zeros(2, dtype=torch.int64),
            "labels: torch.int64 (2,): expected int32 or int64 (3,)",
        ),
        (torch.zeros(3, 4), torch.zeros(3), "labels: torch.float32 (3,): expected int32 or int64"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64, device="meta"), "labels: on meta: expected cpu"),
        (torch.zeros(30, 4), torch.arange(30) - 25, "labels: -25 at sample 0: expected 0 to 3, or -1 to ignore"),
        (torch.zeros(30, 4), torch.arange(30) // 5, "labels: 4 at sample 20: expected 0 to 3, or -1 to ignore"),
    ],
)
def test_wrong_use(operator, logits, labels, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011, the message is compared below
        operator(logits, labels)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)],
)
def test_gradient_is_softmax_minus_onehot(dtype, tolerance):
    logits, labels = random_case(40, 10)
    logits = logits.to(dtype).requires_grad_()
    weights = torch.linspace(-1, 2, 40, dtype=dtype if dtype == torch.float64 else torch.float32)
    (per_sample(logits, labels).loss * weights).sum().backward()
    expected = softmax(logits.detach().double().numpy(), -1)
    for row, label in enumerate(labels.tolist()):
        expected[row] = expected[row] - np.eye(10)[label] if label >= 0 else 0
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    np.testing.assert_allclose(logits.grad.double().numpy(), expected * weights.numpy()[:, None], atol=tolerance)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_compiled_gradient_by_parts(isa, rows, classes, monkeypatch):
    """Compares all columns at once, and two ranges of them in place, with PyTorch's autograd in float64."""
    monkeypatch.setattr(native, "isa_index", lambda: isa)
    logits, labels = random_case(rows, classes)
    weights = torch.linspace(-1, 2, rows)
    exact = logits.double().requires_grad_()
    (per_sample_reference(exact, labels).loss * weights).sum().backward()
    top, confidence = logits.amax(1), per_sample(logits, labels).confidence
    whole = loss_gradient(logits, labels, top, confidence, weights, torch.empty_like(logits))
    torch.testing.assert_close(whole.double(), exact.grad, atol=2e-6, rtol=1e-6)
    middle = (classes + 1) // 2
    parts = [logits[:, :middle].contiguous(), logits[:, middle:].contiguous()]
    for part, first in zip(parts, (0, middle), strict=True):
        loss_gradient(part, labels, top, confidence, weights, part, first, classes)
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives(dtype):
    """Gradient matching differentiates the norm of a gradient. Compares with PyTorch's cross-entropy."""
    logits, labels = random_case(12, 7)

    def of_gradient_norm(loss_of):
        x = logits.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(x).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    ours = of_gradient_norm(lambda x: per_sample(x, labels).loss)
    theirs = of_gradient_norm(lambda x: torch.nn.functional.cross_entropy(x, labels, ignore_index=-1, reduction="none"))
    torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    logits, labels = random_case(6, 5)
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: per_sample(x, labels).loss, logits)
    assert torch.autograd.gradcheck(lambda x: per_sample_reference(x, labels).loss, logits)


def test_only_the_loss_has_a_gradient():
    logits, labels = random_case(6, 5)
    loss, *others = per_sample(logits.requires_grad_(), labels)
    assert loss.requires_grad
    assert not any(r.requires_grad for r in others)
    with torch.no_grad():
        assert not per_sample(logits, labels).loss.requires_grad


def test_an_ignored_row_has_no_gradient_even_if_undefined():
    logits = torch.tensor([[NAN, 0.0], [INF, 0.0], [0.0, 0.0]], requires_grad=True)
    per_sample(logits, torch.tensor([-1, -1, 0])).loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0, 0], [0, 0], [-0.5, 0.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    logits, labels = random_case(6, 5)
    torch.library.opcheck(_operator, (logits.to(dtype), labels))
    logits = logits.to(dtype)
    results = per_sample(logits, labels)
    torch.library.opcheck(_gradient, (logits, labels, results.prediction, results.confidence, results.loss))
    torch.library.opcheck(_operator, (logits.requires_grad_(), labels))


def test_full_graph_equals_eager():
    """Traces forward and backward by torch.compile(fullgraph=True), without code generation."""

    def step(logits, labels):
        results = per_sample(logits * 2, labels)
        return (results.loss * results.confidence).sum(), results

    logits, labels = random_case(30, 10)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected, results = step(ours, labels)
    total, traced = torch.compile(step, fullgraph=True, backend="aot_eager")(theirs, labels)
    expected.backward()
    total.backward()
    assert_close(traced, [r.detach() for r in results], atol=0, rtol=0)
    torch.testing.assert_close(theirs.grad, ours.grad)
