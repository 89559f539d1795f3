from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tadperf.kernels import native, trajectory_distance, trajectory_distance_reference
from tadperf.kernels.ops.trajectory_distance import _gradient, _operator, student_gradient

INF, NAN = float("inf"), float("nan")
compiled = native.module()
ISAS = range(len(compiled.isas())) if compiled else ()
needs_native = pytest.mark.skipif(compiled is None, reason=native.reason())
OPERATORS = pytest.mark.parametrize("operator", [trajectory_distance, trajectory_distance_reference])
BOUND = 1.3e-6  # as the module states it; float32 results add half an ulp, 6e-8


def random_case(rows, size, seed=0, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    student, target, start = (torch.randn(rows, size, generator=random).to(dtype) for _ in range(3))
    return student, target, start


def truth(inputs, lengths):
    """Returns distance, expert distance and ratio [B, S], computed by NumPy in float64."""
    s, t, u = (np.atleast_2d(x.detach().double().numpy()) for x in inputs)
    rows = max(len(s), len(t), len(u))
    out = np.zeros((2, rows, len(lengths)))
    borders = np.cumsum([0, *lengths])
    for row in range(rows):
        one = [x[row if len(x) > 1 else 0] for x in (s, t, u)]
        squares = np.square(one[0] - one[1]), np.square(one[2] - one[1])
        for segment, (begin, end) in enumerate(itertools.pairwise(borders)):
            out[:, row, segment] = [x[begin:end].sum() for x in squares]
    with np.errstate(divide="ignore", invalid="ignore"):
        return out[0], out[1], out[0] / out[1]


def run_native(inputs, lengths, isa, threads):
    rows = max(len(x) for x in inputs)
    out = [torch.full((rows, len(lengths)), 7.0) for _ in range(3)]
    native.call("trajectory_distance", *inputs, lengths, *out, isa=isa, threads=threads)
    return out


def run_native_gradient(inputs, lengths, factors, grads, isa, threads):
    native.call("trajectory_distance_gradient", *inputs, lengths, *factors, *grads, isa=isa, threads=threads)
    return grads


def assert_close(results, expected, rtol=2 * BOUND, atol=0.0):
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result.detach().double().numpy(), wanted, rtol=rtol, atol=atol)


def same_bits(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


SHAPES = [(1, 1), (2, 2), (3, 7), (7, 127), (5, 129), (2, 252), (3, 507), (2, 1024), (2, 16_385), (1, 50_001)]


@pytest.mark.parametrize(("rows", "size"), SHAPES)
@OPERATORS
def test_against_float64(operator, rows, size):
    inputs = random_case(rows, size)
    results = operator(*inputs)
    assert [r.dtype for r in results] == [torch.float32] * 3
    assert [tuple(r.shape) for r in results] == [(rows,)] * 3
    assert_close(results, [x[:, 0] for x in truth(inputs, [size])])
    alone = operator(*(x[-1] for x in inputs))
    assert [tuple(r.shape) for r in alone] == [()] * 3
    assert same_bits([r.reshape(1) for r in alone], [r[-1:] for r in operator(*(x[-1:] for x in inputs))])


@pytest.mark.parametrize("size", [1, 7, 50_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_the_student_in_one_pass(size, dtype):
    student, target, start = (x[0].requires_grad_() for x in random_case(1, size, dtype=dtype))
    result = trajectory_distance(student, target, start)
    (expected,) = torch.autograd.grad(result.ratio, student)
    gradient = student_gradient(student.detach(), target.detach(), 2 / result.expert_distance.detach())
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("values", ["random", "large and small", "one large", "close", "tiny", "huge"])
def test_errors_are_within_the_stated_bounds(values):
    """On 64 rows of 320 010 parameters, the error against float64 is at most 1.3e-6, and 1e-7 on random values."""
    size = 320_010
    random = torch.Generator().manual_seed(0)
    base = torch.randn(3, size + 63 * 5, generator=random)
    if values == "large and small":
        base *= 10 ** torch.linspace(-8, 8, base.shape[1])
    elif values == "one large":
        base[:, 200_000:] *= 1e-4
        base[0, 200_000] = 1e8
    elif values == "close":
        base = base[:1] + 1e-6 * base
    elif values in ("tiny", "huge"):
        base *= 1e-16 if values == "tiny" else 1e15
    inputs = [x.as_strided((64, size), (5, 1)) for x in base]
    results = trajectory_distance(*inputs)
    bound = 1e-7 if values == "random" else BOUND + 6e-8
    assert_close(results[:2], [x[:, 0] for x in truth(inputs, [size])[:2]], rtol=bound)


@pytest.mark.parametrize("size", [3, 129, 5000, 320_010])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_accurate_than_pytorch(dtype, size):
    inputs = random_case(2, size, dtype=dtype)
    s, t, u = inputs
    rivals = (s - t).square().sum(-1), (u - t).square().sum(-1)
    expected = truth(inputs, [size])
    for result, rival, wanted in zip(trajectory_distance(*inputs)[:2], rivals, expected, strict=False):
        error, rival_error = (np.abs(x.double().numpy() / wanted[:, 0] - 1).max() for x in (result, rival))
        assert error <= rival_error + 1e-7


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_every_instruction_set(isa, rows, size):
    lengths = [size // 3, 0, size - size // 3]
    inputs = random_case(rows, size)
    assert_close(run_native(inputs, lengths, isa, 1)[:2], truth(inputs, lengths)[:2])
    factors = torch.randn(rows, 3), torch.randn(rows, 3)
    grads = run_native_gradient(inputs, lengths, factors, [torch.full_like(x, 7) for x in inputs], isa, 1)
    s, t, u = (x.double() for x in inputs)
    repeats = torch.tensor(lengths)
    left, right = (f.double().repeat_interleave(repeats, -1) * d for f, d in zip(factors, (s - t, u - t), strict=True))
    assert_close(grads, [left.numpy(), -(left + right).numpy(), right.numpy()], rtol=3e-7, atol=2e-6)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_any_number_of_threads(isa):
    student, target, start = random_case(5, 70_001)
    inputs = student, target[:1], start  # target's gradient sums over the rows
    lengths = [17_000, 1, 33_000, 20_000]
    factors = torch.randn(5, 4), torch.randn(5, 4)

    def both(threads):
        grads = [torch.full_like(x, 7) for x in inputs]
        return [
            *run_native(inputs, lengths, isa, threads),
            *run_native_gradient(inputs, lengths, factors, grads, isa, threads),
        ]

    one = both(1)
    for threads in (2, 3, 7):
        assert same_bits(one, both(threads))


def finite_halves(dtype):
    """Returns every value of a 16-bit type with a magnitude below 1e15, also the subnormal ones."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.isfinite() & (x.float().abs() < 1e15)]


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_read_exactly(isa, dtype):
    """Each value, in a segment of its own, gives the same bits as in float32."""
    x = finite_halves(dtype).unsqueeze(0)
    zeros = torch.zeros_like(x)
    lengths = [1] * x.shape[1]
    wide = run_native([x.float(), zeros.float(), x.float()], lengths, isa, 1)
    assert same_bits(run_native([x, zeros, x], lengths, isa, 1), wide)
    assert torch.equal(wide[0], x.float().square())


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_are_rounded_as_pytorch_does(isa, dtype):
    """Equals .to(dtype) of the float32 gradient, also for ties, overflow, subnormal results and infinities."""
    x = finite_halves(dtype).unsqueeze(0)
    size = x.shape[1]
    for factor in (1.0, 1 + 2.0**-8, 1 + 2.0**-11, 1 - 2.0**-11, 2.0**-9, 3.3, 1e-3, 1e5, -1e30, 3e38):
        factors = torch.full((1, 1), factor), torch.zeros(1, 1)
        grads = [torch.empty(1, size, dtype=dtype), torch.empty(0, 0), torch.empty(0, 0)]
        narrow = run_native_gradient([x, torch.zeros_like(x), x], [size], factors, grads, isa, 1)[0]
        assert torch.equal(narrow, (x.float() * factor).to(dtype)), factor


@OPERATORS
def test_hard_values(operator):
    one, nothing = torch.ones(300), torch.zeros(300)
    far = one.clone()
    far[123] = INF
    undefined = one.clone()
    undefined[299] = NAN
    student = torch.stack([one, nothing, one, far, undefined, one, nothing * -1])
    target = torch.zeros(7, 300)
    start = torch.stack([nothing, nothing, 2 * one, one, one, far, one])
    results = operator(student, target, start)
    expected = [
        (300, 0, INF),
        (0, 0, NAN),
        (300, 1200, 0.25),
        (INF, 300, INF),
        (NAN, 300, NAN),
        (300, INF, 0),
        (0, 300, 0),
    ]
    np.testing.assert_array_equal(torch.stack(list(results), 1).numpy(), np.array(expected, np.float32))


@OPERATORS
def test_empty(operator):
    assert [tuple(r.shape) for r in operator(*random_case(0, 5))] == [(0,)] * 3
    assert [tuple(r.shape) for r in operator(*random_case(0, 5), segments=(2, 3))] == [(0, 2)] * 3
    results = operator(*random_case(3, 0))
    assert results.distance.tolist() == results.expert_distance.tolist() == [0, 0, 0]
    assert results.ratio.isnan().all()
    x = torch.zeros(5, requires_grad=True)
    operator(x, torch.zeros(0, 5), torch.ones(5)).distance.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0] * 5


@OPERATORS
def test_segments_are_sums_of_their_parts(operator):
    lengths = (1, 128, 0, 20_000, 7, 3)
    inputs = random_case(4, sum(lengths))
    results = operator(*inputs, lengths)
    assert_close(results[:2], truth(inputs, lengths)[:2])
    assert same_bits(results, operator(*inputs, torch.tensor(lengths)))
    parts = [operator(*(x.split(lengths, -1)[i] for x in inputs)) for i in range(len(lengths))]
    for i, part in enumerate(parts):
        assert_close([r[:, i] for r in results], part, rtol=2e-7)


@OPERATORS
@pytest.mark.parametrize("shapes", [((4,), (), ()), ((), (4,), (1,)), ((2, 3), (3,), ()), ((2, 1), (1, 3), (2, 3))])
def test_batch_shapes_broadcast(operator, shapes):
    random = torch.Generator().manual_seed(1)
    inputs = [torch.randn(*shape, 301, generator=random, requires_grad=True) for shape in shapes]
    batch = torch.broadcast_shapes(*shapes)
    results = operator(*inputs, segments=(300, 1))
    whole = [x.detach().double().expand(*batch, 301).reshape(-1, 301) for x in inputs]
    assert [tuple(r.shape) for r in results] == [(*batch, 2)] * 3
    assert_close([r.reshape(-1, 2) for r in results], truth(whole, [300, 1]), rtol=5e-6)
    results.ratio.sum().backward()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    trajectory_distance_reference(*exact, segments=(300, 1)).ratio.sum().backward()
    for x, wanted in zip(inputs, exact, strict=True):
        assert x.grad is not None
        assert wanted.grad is not None
        assert (x.grad - wanted.grad).abs().max() <= 2e-6 * wanted.grad.abs().max()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_stride_and_dtype(data):
    rows = data.draw(st.integers(0, 4), label="rows")
    lengths = data.draw(st.lists(st.integers(0, 700), min_size=1, max_size=4), label="lengths")
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    inputs = []
    for name in ("student", "target", "start"):
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label=name)
        step, offset = data.draw(st.integers(1, 2), label="step"), data.draw(st.integers(0, 3), label="offset")
        alone = data.draw(st.booleans(), label="alone")
        whole = torch.randn(1 if alone else rows, sum(lengths) * step + offset + 2, generator=random).to(dtype)
        inputs.append(whole[:, offset : offset + sum(lengths) * step : step].requires_grad_())
    results = trajectory_distance(*inputs, segments=lengths)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = trajectory_distance_reference(*exact, segments=lengths)
    assert_close(results, [x.detach().numpy() for x in expected], rtol=5e-6)
    defined = [
        torch.where(r.expert_distance > 1, r.ratio, 0).sum() + (r.distance - 2 * r.expert_distance).sum()
        for r in (results, expected)
    ]
    torch.autograd.backward(defined)
    for x, wanted in zip(inputs, exact, strict=True):
        assert x.grad is not None
        assert wanted.grad is not None
        tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[x.dtype]
        torch.testing.assert_close(x.grad.double(), wanted.grad, rtol=tolerance, atol=tolerance, equal_nan=True)


ZEROS = torch.zeros(3, 4)


@OPERATORS
@pytest.mark.parametrize(
    ("inputs", "segments", "message"),
    [
        ((ZEROS.long(), ZEROS, ZEROS), None, "student: torch.int64 (3, 4) on cpu: expected floats [..., P]"),
        ((torch.zeros(()), ZEROS, ZEROS), None, "student: torch.float32 () on cpu: expected floats [..., P]"),
        (
            (ZEROS, ZEROS[:, :3], ZEROS),
            None,
            "target: torch.float32 (3, 3) on cpu: expected floats [..., P], with P and dev",
        ),
        ((ZEROS, ZEROS, ZEROS.to("meta")), None, "start: torch.float32 (3, 4) on meta: expected floats [..., P]"),
        ((ZEROS, ZEROS[:2], ZEROS), None, "batch shapes [(3,), (2,), (3,)]: expected shapes that broadcast"),
        ((ZEROS, ZEROS, ZEROS), (1, 2), "segments: [1, 2]: expected lengths of 0 or more that sum to 4"),
        ((ZEROS, ZEROS, ZEROS), (5, -1), "segments: [5, -1]: expected lengths of 0 or more that sum to 4"),
        ((ZEROS, ZEROS, ZEROS), (), "segments: []: expected lengths of 0 or more that sum to 4"),
        ((ZEROS, ZEROS, ZEROS), torch.tensor([4.0]), "segments: torch.float32 (1,): expected int64 [S]"),
    ],
)
def test_wrong_use(operator, inputs, segments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011, the message is compared below
        operator(*inputs, segments)
    assert message in str(error.value)


@needs_native
def test_compiled_code_refuses_tensors_that_do_not_fit():
    x, out = torch.zeros(2, 8), [torch.zeros(2, 1) for _ in range(3)]
    for inputs, lengths in (
        ([x.double(), x, x], [8]),
        ([x, x[:, ::2], x], [8]),
        ([x[:, ::2]] * 3, [4]),
        ([x] * 3, [7]),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            native.call("trajectory_distance", *inputs, lengths, *out)
    with pytest.raises(ValueError, match="results: wrong shape"):
        native.call("trajectory_distance", x, x, x, [4, 4], *out)


@pytest.mark.parametrize("segments", [None, (3, 4)])
def test_gradcheck(segments):
    student, target, start = random_case(3, 7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (student, target, start[0])]
    assert torch.autograd.gradcheck(lambda s, t, u: tuple(trajectory_distance(s, t, u, segments)), inputs)
    assert torch.autograd.gradcheck(lambda s, t, u: tuple(trajectory_distance_reference(s, t, u, segments)), inputs)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_gradients_of_the_inputs_that_ask_for_one(needs):
    inputs = [x.requires_grad_(bool(need)) for x, need in zip(random_case(3, 2500), needs, strict=True)]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    for operator, tensors in ((trajectory_distance, inputs), (trajectory_distance_reference, exact)):
        results = operator(*tensors)
        (results.distance.sum() * 2 - results.expert_distance.sum() + 1000 * results.ratio.sum()).backward()
    for x, wanted in zip(inputs, exact, strict=True):
        assert (x.grad is None) == (wanted.grad is None)
        if x.grad is not None and wanted.grad is not None:
            torch.testing.assert_close(x.grad.double(), wanted.grad, rtol=1e-5, atol=1e-5)


def test_an_expert_distance_of_zero_leaves_other_gradients_alone():
    student, target, start = (torch.full((2, 5), float(i), requires_grad=True) for i in (2, 1, 1))
    trajectory_distance(student, target, start).distance.sum().backward()
    assert [x.grad[0, 0].item() for x in (student, target, start)] == [2, -2, 0]  # type: ignore[index]
    results = trajectory_distance(student, target, start)
    assert results.ratio.tolist() == [INF, INF]
    (gradient,) = torch.autograd.grad(results.ratio.sum(), student)
    assert (gradient == INF).all()


def test_no_second_derivative():
    inputs = [x.requires_grad_() for x in random_case(2, 9)]
    for result in trajectory_distance(*inputs):
        gradient = torch.autograd.grad(result.sum(), inputs, create_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match="no second derivative: use trajectory_distance_reference"):
            sum(g.square().sum() for g in gradient if g is not None).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    student, target, start = random_case(3, 8, dtype=dtype)
    torch.library.opcheck(_operator, (student, target[:1], start, [3, 5]))
    torch.library.opcheck(_operator, (student.requires_grad_(), target[:1].requires_grad_(), start, [8]))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factors = torch.randn(3, 2, dtype=wide), torch.randn(3, 2, dtype=wide)
    plain = student.detach(), target[:1].detach(), start
    torch.library.opcheck(_gradient, (*plain, *factors, [3, 5], [True, True, False]))


@pytest.mark.parametrize("segments", [None, (100, 157)])
def test_full_graph_equals_eager(segments):
    """Traces forward and backward by torch.compile(fullgraph=True), without code generation."""

    def step(student, target, start):
        results = trajectory_distance(student * 2, target, start, segments)
        return results.ratio.sum() + results.distance.mean(), results

    student, target, start = random_case(3, 257)
    target = target[0]
    ours, theirs = ([x.clone().requires_grad_() for x in (student, target, start)] for _ in range(2))
    expected, results = step(*ours)
    total, traced = torch.compile(step, fullgraph=True, backend="aot_eager")(*theirs)
    expected.backward()
    total.backward()
    assert same_bits([r.detach() for r in traced], [r.detach() for r in results])
    for x, wanted in zip(theirs, ours, strict=True):
        torch.testing.assert_close(x.grad, wanted.grad)
