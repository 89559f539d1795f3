from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tadperf.kernels import diverse_pick, diverse_pick_reference, native
from tadperf.kernels.ops.diverse_pick import _operator

INF, NAN = float("inf"), float("nan")
compiled = native.module()
ISAS = range(len(compiled.isas())) if compiled else ()
needs_native = pytest.mark.skipif(compiled is None, reason=native.reason())
OPERATORS = pytest.mark.parametrize("operator", [diverse_pick, diverse_pick_reference])


def random_case(anomalies, choices, size, held, classes, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(anomalies, choices, size, generator=random).to(dtype),
        torch.rand(anomalies, choices, generator=random),
        torch.randn(held, size, generator=random).to(dtype),
        torch.randint(classes, (anomalies,), generator=random),
        torch.randint(classes, (held,), generator=random),
    )


def truth(candidates, scores, qualified, classes, qualified_classes, top_k=None, weight=None):
    """Returns index, similarity and the smallest lead of a winner, in float64 NumPy; for finite, nonzero features."""
    x, q, scores = candidates.double().numpy(), qualified.double().numpy(), scores.double().numpy()
    x, q = x / np.linalg.norm(x, axis=-1, keepdims=True), q / np.linalg.norm(q, axis=-1, keepdims=True)
    held = {
        c: [u for u, label in zip(q, qualified_classes.tolist(), strict=True) if label == c]
        for c in set(classes.tolist())
    }
    index, similarity, gap = [], [], INF
    for anomaly, label in enumerate(classes.tolist()):
        order = sorted(range(x.shape[1]), key=lambda k: (-scores[anomaly, k], k))
        pool = order[:top_k]
        largest = {k: max((float(x[anomaly, k] @ u) for u in held[label]), default=-INF) for k in pool}
        if not held[label]:
            value = {k: scores[anomaly, k] for k in pool}
        elif weight is None:
            value = {k: 1 - largest[k] for k in pool}
        else:
            value = {k: scores[anomaly, k] + weight * (1 - largest[k]) for k in pool}
        best = max(sorted(pool), key=value.__getitem__)
        gap = min([gap] + [value[best] - value[k] for k in pool if k != best])
        index.append(best)
        similarity.append(largest[best])
        held[label].append(x[anomaly, best])
    return np.array(index, np.int64), np.array(similarity), gap


def run_native(case, isa, threads, top_k=None, weight=None):
    candidates, scores, qualified, classes, qualified_classes = case
    out = torch.full(classes.shape, 7), torch.full(classes.shape, 7.0)
    options = top_k or candidates.shape[1], NAN if weight is None else weight
    inputs = candidates, scores.double(), qualified, classes, qualified_classes
    native.call("diverse_pick", *inputs, *out, *options, isa=isa, threads=threads)
    return out


def same_bits(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def test_winners_equal_those_of_a_naive_loop_in_1000_cases():
    """Skips the few cases in which float32 rounding could change a winner."""
    random = np.random.default_rng(0)
    compared = 0
    for seed in range(1000):
        anomalies, choices, size, held = (
            int(random.integers(low, high)) for low, high in ((1, 8), (1, 6), (2, 20), (0, 7))
        )
        options = {
            "top_k": [None, 1, 2, 5][random.integers(4)],
            "weight": [None, 0.0, 0.3, 2.0][random.integers(4)],
        }
        case = random_case(anomalies, choices, size, held, classes=int(random.integers(1, 4)), seed=seed)
        index, similarity, gap = truth(*case, **options)
        if gap < 1e-5:
            continue
        compared += 1
        for operator in (diverse_pick, diverse_pick_reference):
            results = operator(*case, **options)
            assert results.index.tolist() == index.tolist(), (seed, options)
            np.testing.assert_allclose(results.similarity.numpy(), similarity, atol=1e-6)
    assert compared > 980


@pytest.mark.parametrize("size", [1, 2, 3, 7, 127, 129, 252, 507, 2051])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@OPERATORS
def test_against_float64(operator, dtype, size):
    case = random_case(30, 5, size, 21, 3, dtype=dtype)
    index, similarity, gap = truth(*case)
    results = operator(*case)
    assert results.index.dtype == torch.int64
    assert results.similarity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if size > 2:  # in one or two dimensions the similarities of many candidates are the same
        assert gap > 1e-6
        assert results.index.tolist() == index.tolist()
        np.testing.assert_allclose(results.similarity.double().numpy(), similarity, atol=5e-7)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set(isa, dtype):
    case = random_case(40, 7, 300, 30, 4, dtype=dtype)
    for options in ({}, {"top_k": 3}, {"weight": 0.5}):
        index, similarity, gap = truth(*case, **options)
        assert gap > 1e-6
        results = run_native(case, isa, 1, **options)
        assert results[0].tolist() == index.tolist()
        np.testing.assert_allclose(results[1].numpy(), similarity, atol=5e-7)
        wide = tuple(x.float() if x.is_floating_point() else x for x in case)
        assert same_bits(results, run_native(wide, isa, 1, **options))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_any_number_of_threads(isa):
    case = random_case(300, 5, 70, 100, 30)
    one = run_native(case, isa, 1)
    for threads in (2, 3, 7):
        assert same_bits(one, run_native(case, isa, threads))


AXES = torch.eye(4)


@OPERATORS
def test_winners_join_their_class(operator):
    """Three anomalies with the axes as candidates: each takes the first axis that its class does not hold."""
    candidates = AXES.expand(6, 4, 4)
    classes = torch.tensor([5, -3, 5, 5, 5, -3])
    results = operator(candidates, torch.ones(6, 4), AXES[:1], classes, torch.tensor([5]))
    assert results.index.tolist() == [1, 0, 2, 3, 0, 1]
    assert results.similarity.tolist() == [0, -INF, 0, 0, 1, 0]


@OPERATORS
@pytest.mark.parametrize("swap", [False, True])
def test_lowest_index_among_equals(operator, swap):
    candidates = torch.stack([AXES[0], AXES[1], AXES[2], AXES[1]]).unsqueeze(0)
    scores = torch.tensor([[0.1, 0.2, 0.2, 0.9]])
    held, of = AXES[[0, 3]], torch.tensor([0, 0])
    if swap:  # int32 classes and other values change nothing
        of = of.int() + 2**31 - 1
    zero = of[:1]
    assert operator(candidates, scores, held, zero, of).index.item() == 1
    assert operator(candidates, scores, held, zero, of, top_k=2).index.item() == 1  # the pool is 3 and, by its index, 1
    assert operator(candidates, scores, held, zero, of, top_k=1).index.item() == 3
    assert operator(candidates, scores, held, zero, of, weight=0.1).index.item() == 3
    assert operator(candidates, scores.fill_(0.5), held, zero, of, weight=3).index.item() == 1
    assert operator(candidates, scores, held[:0], zero, of[:0]).index.item() == 0


@OPERATORS
def test_weight_trades_score_for_diversity(operator):
    half = torch.tensor([1.0, 1.0, 0, 0])
    case = torch.stack([AXES[0], half, AXES[2]]).unsqueeze(0), torch.tensor([[0.9, 0.8, 0.0]]), AXES[:1]
    labels = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    values = [operator(*case, *labels, weight=weight) for weight in (0, 0.3, 0.7, 10)]
    assert [v.index.item() for v in values] == [0, 0, 1, 2]
    assert [v.similarity.item() for v in values] == pytest.approx([1, 1, 0.5**0.5, 0])
    assert operator(*case, *labels, weight=10, top_k=2).index.item() == 1


@OPERATORS
def test_candidates_that_are_excluded(operator):
    candidates = AXES.repeat(5, 1, 1)
    scores = torch.ones(5, 4)
    scores[0, :2] = torch.tensor([NAN, -INF])
    scores[1] = -INF
    candidates[2, 1, 2], candidates[2, 2, 3] = NAN, -INF
    candidates[3] = INF
    scores[4] = torch.tensor([0.5, INF, 0.5, INF])
    zeros = torch.zeros(5, dtype=torch.int64)
    held = torch.stack([AXES[0], torch.tensor([0, NAN, 0, 0]), AXES[0] * INF])
    results = operator(candidates, scores, held, torch.arange(5), torch.arange(3).fill_(2))
    assert results.index.tolist() == [2, -1, 3, -1, 1]
    np.testing.assert_array_equal(results.similarity, [-INF, NAN, 0, NAN, -INF])
    assert operator(candidates, scores, held, torch.arange(5), zeros[:3] + 2, top_k=1).index.tolist() == [
        2,
        -1,
        0,
        -1,
        1,
    ]
    assert operator(candidates, scores, held, zeros, zeros[:3] + 2).index.tolist() == [2, -1, 0, -1, 1]


@OPERATORS
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e30, 3e38])
def test_length_of_features_does_not_matter(operator, scale):
    """Their squares overflow or underflow float32. A row of zeros has cosine 0 with every other row."""
    candidates = torch.stack([AXES[0] * scale, -AXES[0] * scale, torch.zeros(4)]).unsqueeze(0)
    label = torch.zeros(1, dtype=torch.int64)
    results = operator(candidates, torch.ones(1, 3), AXES[:1], label, label)
    assert (results.index.item(), results.similarity.item()) == (1, -1)
    results = operator(candidates[:, ::2], torch.ones(1, 2), AXES[:1], label, label)
    assert (results.index.item(), results.similarity.item()) == (1, 0)


@OPERATORS
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty(operator, shape):
    anomalies, choices, size = shape
    labels = torch.zeros(anomalies, dtype=torch.int64)
    for held in (0, 2):
        results = operator(
            torch.zeros(shape), torch.ones(shape[:2]), torch.zeros(held, size), labels, torch.zeros(held).int()
        )
        assert results.index.tolist() == ([0, 0] if choices else [-1, -1])[:anomalies]
        if choices and anomalies:
            assert results.similarity.tolist() == ([0, 0] if held else [-INF, 0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_stride_and_dtype(data):
    anomalies, choices, size, held = (
        data.draw(st.integers(low, high), label=name)
        for name, low, high in (("A", 0, 7), ("K", 1, 9), ("D", 3, 40), ("Q", 0, 9))
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype")
    step = data.draw(st.integers(1, 2), label="step")
    candidates, scores, qualified, classes, of = random_case(
        anomalies, choices, size * step, held, 3, seed=data.draw(st.integers(0, 99), label="seed"), dtype=dtype
    )
    if data.draw(st.booleans(), label="transposed"):
        candidates = candidates.transpose(0, 1).contiguous().transpose(0, 1)
    case = candidates[..., ::step], scores.to(dtype), qualified[:, ::step].double().float(), classes.int(), of
    options = {
        "top_k": data.draw(st.sampled_from([None, 1, 3]), label="top_k"),
        "weight": data.draw(st.sampled_from([None, 0.7]), label="weight"),
    }
    index, similarity, gap = truth(*case, **options)
    results = diverse_pick(*case, **options)
    if gap > 1e-5:
        assert results.index.tolist() == index.tolist()
        np.testing.assert_allclose(results.similarity.numpy(), similarity, atol=1e-6)


@OPERATORS
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_types_that_differ_are_read_exactly(operator, types):
    """Qualified images are not rounded to the type of the candidates."""
    candidates, scores, qualified, classes, of = random_case(20, 5, 30, 15, 2)
    case = candidates.to(types[0]), scores, qualified.to(types[1]), classes, of
    index, similarity, gap = truth(*case)
    assert gap > 1e-6
    results = operator(*case)
    assert results.index.tolist() == index.tolist()
    np.testing.assert_allclose(results.similarity.numpy(), similarity, atol=5e-7)


GOOD = random_case(2, 3, 4, 5, 2)
WRONG = [
    (0, GOOD[0][0], {}, "candidates: torch.float32 (3, 4): expected floats [A, K, D]"),
    (0, GOOD[0].long(), {}, "candidates: torch.int64 (2, 3, 4): expected floats [A, K, D]"),
    (1, GOOD[1][:1], {}, "scores: torch.float32 (1, 3): expected floats (2, 3)"),
    (2, GOOD[2][:, :2], {}, "qualified: torch.float32 (5, 2): expected floats [Q, 4]"),
    (2, GOOD[2].to("meta"), {}, "qualified: on meta: expected cpu, like the candidates"),
    (3, GOOD[3].float(), {}, "classes: torch.float32 (2,): expected int32 or int64 (2,)"),
    (4, GOOD[4][:2], {}, "qualified_classes: torch.int64 (2,): expected int32 or int64 (5,)"),
    (4, GOOD[4], {"top_k": 0}, "top_k: 0: expected 1 or more, or None"),
    (4, GOOD[4], {"weight": -1}, "weight: -1: expected a finite number of 0 or more, or None"),
    (4, GOOD[4], {"weight": NAN}, "weight: nan: expected a finite number of 0 or more, or None"),
]


@OPERATORS
@pytest.mark.parametrize(("place", "tensor", "options", "message"), WRONG)
def test_wrong_use(operator, place, tensor, options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011, the message is compared below
        operator(*GOOD[:place], tensor, *GOOD[place + 1 :], **options)
    assert message in str(error.value)


def test_no_gradient():
    case = [x.clone().requires_grad_() if x.is_floating_point() else x for x in GOOD]
    for operator in (diverse_pick, diverse_pick_reference):
        assert not operator(*case).similarity.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    case = random_case(4, 3, 5, 6, 2, dtype=dtype)
    for top_k, weight in itertools.product((None, 2), (None, 0.5)):
        torch.library.opcheck(_operator, (*case, top_k, weight), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(_operator, (*case, None, None))


def test_full_graph_equals_eager():
    def step(candidates, *others):
        results = diverse_pick(candidates * 2, *others, top_k=3, weight=1)
        return results.similarity.sum(), results

    case = random_case(9, 4, 17, 6, 2)
    total, traced = torch.compile(step, fullgraph=True, backend="aot_eager")(*case)
    expected, results = step(*case)
    assert same_bits(traced, results)
    assert torch.equal(total, expected)
