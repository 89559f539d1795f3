from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from tadperf.kernels import Reliability, native, reliability, reliability_reference
from tadperf.kernels.ops.reliability import _operator, centre_and_directions

INF, NAN = float("inf"), float("nan")
compiled = native.module()
ISAS = range(len(compiled.isas())) if compiled else ()
needs_native = pytest.mark.skipif(compiled is None, reason=native.reason())
OPERATORS = [reliability, reliability_reference]
SHAPES = [(0, 3, 2), (1, 1, 1), (3, 2, 2), (7, 3, 127), (33, 7, 12), (65, 129, 13), (17, 252, 25), (130, 507, 24)]


def random_case(rows, width, classes, seed=0, condition=30.0, offset=3.0):
    """Returns features, anchors offset from the origin, and the Cholesky factor of a covariance of this condition."""
    random = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64)).Q
    covariance = (q * torch.logspace(0, -np.log10(condition), width, dtype=torch.float64)) @ q.mT
    cholesky = torch.linalg.cholesky(covariance)
    anchors = torch.randn(classes, width, generator=random) + offset
    noise = (torch.randn(rows, width, generator=random, dtype=torch.float64) @ cholesky.mT).float()
    features = anchors[torch.randint(classes, (rows,), generator=random)] + noise
    return features, anchors, cholesky.float()


def tables(features, anchors, cholesky):
    """Returns distances and similarities [N, C] in float64, computed by SciPy."""
    z, mu, factor = (t.double().numpy() for t in (features, anchors, cholesky))
    inverse = np.linalg.inv(np.tril(factor))
    distances = cdist(z, mu, metric="mahalanobis", VI=inverse.T @ inverse)
    return torch.as_tensor(distances), torch.as_tensor(1 - cdist(z, mu, metric="cosine"))


def errors(result, features, anchors, cholesky):
    """Returns the largest error of the values, and of the true values of the chosen anchors.

    Errors of distances are relative to the sample's smallest distance or, if larger, a tenth of its largest one.
    """
    distances, similarities = tables(features, anchors, cholesky)
    worst = []
    for table, (first, first_value, second, second_value), sign in (
        (distances, result[:4], 1),
        (similarities, result[4:], -1),
    ):
        ordered = (sign * table).sort(-1).values * sign
        scale = torch.maximum(ordered[:, 0], ordered[:, -1] / 10) if sign > 0 else 1
        for place, (index, value) in enumerate(((first, first_value), (second, second_value))):
            if place < table.shape[1]:
                worst.append(((value - ordered[:, place]).abs() / scale).max().item())
                worst.append(((table.gather(1, index[:, None])[:, 0] - ordered[:, place]).abs() / scale).max().item())
        assert (first != second).all()
    return max(worst)


def run_native(features, anchors, cholesky, isa, threads):
    """Runs the compiled operator with an instruction set (an index) and a number of threads."""
    centre, directions = centre_and_directions(anchors, torch.float32)
    out = [torch.full((len(features),), 7, dtype=dtype) for dtype in (torch.int64, torch.float32) * 4]
    matrices = anchors.contiguous(), directions, centre, cholesky.contiguous()
    native.call("reliability", features, *matrices, *out, isa=isa, threads=threads)
    return Reliability(*out)


def same_bits(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("rows", "width", "classes"), SHAPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_against_scipy(operator, rows, width, classes):
    case = random_case(rows, width, classes)
    result = operator(*case)
    assert [r.dtype for r in result] == [torch.int64, torch.float32] * 4
    assert all(r.shape == (rows,) for r in result)
    if rows and classes > 1:
        assert errors(result, *case) < 1e-5


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "width", "classes"), SHAPES[2:])
def test_every_instruction_set(isa, rows, width, classes):
    case = random_case(rows, width, classes)
    assert errors(run_native(*case, isa, 1), *case) < 1e-5


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(("width", "condition"), [(64, 1e4), (600, 1e4), (600, 10.0)])
def test_no_less_accurate_than_pytorch(width, condition, offset):
    """Our error against float64 is at most that of the usual form in PyTorch in float32, plus 1e-5."""
    features, anchors, cholesky = random_case(200, width, 20, condition=condition, offset=offset)
    whitened = [torch.linalg.solve_triangular(cholesky, x.mT, upper=False).mT for x in (features, anchors)]
    distance, nearest = torch.cdist(*whitened).topk(2, largest=False)
    cosines = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(anchors).mT
    similarity, similar = cosines.topk(2)
    theirs = [x[:, i] for i in (0, 1) for x in (nearest, distance)]
    theirs += [x[:, i] for i in (0, 1) for x in (similar, similarity)]
    ours = errors(reliability(features, anchors, cholesky), features, anchors, cholesky)
    assert ours <= errors(theirs, features, anchors, cholesky) + 1e-5


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_sample_at_its_anchor_is_at_distance_0(operator):
    """There the expanded form |y|^2 - 2 y'v + |v|^2 would give rounding errors only."""
    _, anchors, cholesky = random_case(1, 200, 30, condition=1e4, offset=1000.0)
    result = operator(anchors, anchors, cholesky)
    assert result.nearest.tolist() == result.most_similar.tolist() == list(range(30))
    assert (result.distance <= (0 if operator is reliability and compiled else 1e-2)).all()
    assert (result.similarity > 1 - 1e-6).all()
    assert (result.similarity <= 1).all()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("hard", [NAN, INF, -INF, 3e38])
def test_features_without_a_distance(operator, hard):
    """They get class -1 and NaN. No bit of the other samples changes."""
    features, anchors, cholesky = random_case(50, 33, 14)
    clean = operator(features, anchors, cholesky)
    features = features.clone()
    features[13, 5] = hard
    result = operator(features, anchors, cholesky)
    assert [r[13].item() for r in result[::2]] == [-1] * 4
    assert all(r[13].isnan() for r in result[1::2])
    rest = torch.arange(50) != 13
    assert same_bits([r[rest] for r in result], [r[rest] for r in clean])


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("hard", [NAN, INF])
def test_anchors_that_are_not_finite_are_never_chosen(operator, hard):
    features, anchors, cholesky = random_case(50, 33, 14)
    expected = operator(features, anchors[1:], cholesky)
    anchors = anchors.clone()
    anchors[0, 3] = hard
    result = operator(features, anchors, cholesky)
    for ours, wanted in zip(result[::2], expected[::2], strict=True):
        assert torch.equal(ours, wanted + 1)
    for ours, wanted in zip(result[1::2], expected[1::2], strict=True):
        torch.testing.assert_close(ours, wanted)
    nothing = operator(features, torch.full_like(anchors, NAN), cholesky)
    assert all((r == -1).all() for r in nothing[::2])


@pytest.mark.parametrize("operator", OPERATORS)
def test_with_one_anchor_there_is_no_second_one(operator):
    result = operator(*random_case(20, 9, 1))
    assert (result.nearest == 0).all()
    assert (result.most_similar == 0).all()
    assert (result.second == -1).all()
    assert (result.second_similar == -1).all()
    assert result.second_distance.isnan().all()
    assert result.second_similarity.isnan().all()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("copies", [2, 3, 40])
@pytest.mark.parametrize("exact", [False, True])
def test_lowest_index_among_equals(operator, copies, exact):
    """The matrix products of the reference may round equal columns differently, except for sums of one term."""
    features, anchors, cholesky = random_case(100, 21, 5)
    if exact:
        anchors, cholesky = torch.cat([torch.eye(5, 21), -torch.eye(5, 21)]), torch.eye(21) / 2
    elif operator is reliability_reference or compiled is None:
        pytest.skip("needs the compiled operator")
    once = operator(features, anchors, cholesky)
    many = operator(features, anchors.repeat(copies, 1), cholesky)
    assert torch.equal(many.nearest, once.nearest)
    assert torch.equal(many.second, once.nearest + len(anchors))
    assert torch.equal(many.second_distance, many.distance)
    assert torch.equal(many.most_similar, once.most_similar)
    assert torch.equal(many.second_similar, once.most_similar + len(anchors))


@pytest.mark.parametrize("operator", OPERATORS)
def test_features_and_anchors_of_length_0_have_similarity_0(operator):
    features, anchors, cholesky = random_case(20, 8, 4)
    features[3], anchors[2] = 0, 0
    result = operator(features, anchors, cholesky)
    at_origin = [result.most_similar[3], result.similarity[3], result.second_similar[3], result.second_similarity[3]]
    assert [x.item() for x in at_origin] == [0, 0, 1, 0]
    opposite = operator(-features.abs(), anchors.abs(), cholesky)  # every other cosine is below 0
    assert opposite.most_similar.tolist() == [2] * 3 + [0] + [2] * 16
    assert (opposite.similarity == 0).all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_values_above_the_diagonal_are_not_read(operator):
    features, anchors, cholesky = random_case(20, 30, 4)
    dirty = cholesky + torch.full_like(cholesky, 7).triu(1)
    assert same_bits(operator(features, anchors, cholesky), operator(features, anchors, dirty))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_any_number_of_threads(isa):
    case = random_case(3000, 61, 50)
    one = run_native(*case, isa, 1)
    for threads in (2, 3, 7):
        assert same_bits(one, run_native(*case, isa, threads))
    some = run_native(case[0][100:117], *case[1:], isa, 1)  # and for a part of the samples
    assert same_bits([r[100:117] for r in one], some)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_stride_and_type(data):
    batch = data.draw(st.lists(st.integers(0, 5), max_size=3), label="batch shape")
    width, classes = data.draw(st.integers(1, 70), label="width"), data.draw(st.integers(2, 30), label="classes")
    step, first = data.draw(st.integers(1, 3), label="stride"), data.draw(st.integers(0, 3), label="offset")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), label="type")
    seed, transposed = data.draw(st.integers(0, 99), label="seed"), data.draw(st.booleans(), label="transposed")
    features, anchors, cholesky = random_case(int(np.prod(batch)), width * step + first, classes, seed)
    features = features.reshape(*batch, width * step + first)[..., first::step].to(dtype)
    if transposed and len(batch) >= 2:
        features = features.transpose(0, 1)
    anchors, cholesky = anchors.mT.contiguous().mT[:, first::step], torch.linalg.cholesky(torch.eye(width) * 2)
    result = reliability(features, anchors, cholesky)
    assert all(r.shape == features.shape[:-1] for r in result)
    values = torch.float64 if dtype == torch.float64 else torch.float32
    assert [r.dtype for r in result] == [torch.int64, values] * 4
    if result.nearest.numel():
        flat = [r.reshape(-1) for r in result]
        assert errors(flat, features.reshape(-1, width), anchors, cholesky) < (1e-11 if values.itemsize == 8 else 1e-5)


@needs_native
def test_half_types_are_read_exactly():
    """Every bfloat16 and float16 number, also a subnormal one, is read as the equal float32 number."""
    for dtype in (torch.bfloat16, torch.float16):
        features = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None]
        anchors, cholesky = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.5]])
        for isa in ISAS:
            narrow, wide = (run_native(f, anchors, cholesky, isa, 1) for f in (features, features.float()))
            assert same_bits(narrow, wide)


@pytest.mark.parametrize(("size", "stride"), [((2, 40), (2**31, 1)), ((3, 2), (1, 2**31))])
def test_offsets_beyond_32_bits(size, stride):
    """Only the touched pages of the 4 GB take memory."""
    anchors, cholesky = random_case(1, size[1], 5)[1:]
    features = torch.empty(2**31 + 40, dtype=torch.bfloat16).as_strided(size, stride)
    features.copy_(torch.randn(size, generator=torch.Generator().manual_seed(0)))
    assert same_bits(reliability(features, anchors, cholesky), reliability(features.float(), anchors, cholesky))


@pytest.mark.parametrize("operator", OPERATORS)
def test_float64(operator):
    case = [t.double() for t in random_case(40, 60, 11, condition=1e4)]
    assert errors(operator(*case), *case) < 1e-10


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("features", "anchors", "cholesky", "message"),
    [
        (torch.zeros(3, 0), torch.ones(2, 0), torch.eye(0), "features: torch.float32 (3, 0): expected floats [..., D]"),
        (torch.zeros(3, 4).int(), torch.ones(2, 4), torch.eye(4), "features: torch.int32 (3, 4): expected floats"),
        (torch.zeros(3, 4), torch.ones(2, 5), torch.eye(4), "anchors: torch.float32 (2, 5): expected floats [C, 4]"),
        (torch.zeros(3, 4), torch.ones(0, 4), torch.eye(4), "anchors: torch.float32 (0, 4): expected floats [C, 4]"),
        (torch.zeros(3, 4), torch.ones(4), torch.eye(4), "anchors: torch.float32 (4,): expected floats [C, 4]"),
        (torch.zeros(3, 4), torch.ones(2, 4), torch.eye(3), "cholesky: torch.float32 (3, 3): expected floats [4, 4]"),
        (torch.zeros(3, 4), torch.ones(2, 4), torch.eye(4) - 1, "cholesky: 0 on the diagonal at row 0: expected posi"),
        (
            torch.zeros(3, 2),
            torch.ones(2, 2),
            torch.tensor([[1, 0], [0, NAN]]),
            "cholesky: nan on the diagonal at row 1",
        ),
        (torch.zeros(3, 4, device="meta"), torch.ones(2, 4), torch.eye(4), "anchors: on cpu: expected meta"),
    ],
)
def test_wrong_use(operator, features, anchors, cholesky, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011, the message is compared below
        operator(features, anchors, cholesky)
    assert message in str(error.value)


@pytest.mark.parametrize("operator", OPERATORS)
def test_results_have_no_gradient(operator):
    case = [t.requires_grad_() for t in random_case(10, 5, 3)]
    assert not any(r.requires_grad for r in operator(*case))


def test_operator_registration():
    for dtype in (torch.float32, torch.float64):
        case = [t.to(dtype) for t in random_case(10, 5, 3)]
        torch.library.opcheck(_operator, tuple(case))


@pytest.mark.parametrize("shape", [(30, 8), (2, 15, 8)])
def test_compiled_equals_eager(shape):
    features, anchors, cholesky = random_case(30, 8, 5)
    features = features.view(shape).requires_grad_()
    expected = reliability(features, anchors, cholesky)
    traced = torch.compile(reliability, fullgraph=True, backend="aot_eager")(features, anchors, cholesky)
    assert same_bits(traced, expected)
    assert not any(r.requires_grad for r in traced)


MEMORY = """
import resource, torch
from tadperf.kernels import reliability
rows, width, classes = {shape}
features, anchors, cholesky = torch.ones(rows, width), torch.randn(classes, width), torch.eye(width)
reliability(features[:2], anchors[:2], cholesky)
features[::7, ::5] = 0.5
anchors.double().sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reliability(features, anchors, cholesky)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@needs_native
@pytest.mark.parametrize("shape", [(4000, 2048, 100), (30_000, 256, 1000)])
def test_memory(shape):
    """The peak is below 64 MB: packed factor and buffers take about 20. A [30 000, 1000] table would take 120 MB."""
    script = MEMORY.format(shape=shape)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert float(done.stdout) < 64


@pytest.mark.parametrize("operator", OPERATORS)
def test_rounding_exchanges_only_classes_that_are_nearly_equal(operator):
    """Checks the bounds that the module states, for squared distances and cosines, also with one distant anchor."""
    random = torch.Generator().manual_seed(3)
    for case in range(300):
        rows, width, classes = (int(torch.randint(1, high, (1,), generator=random)) for high in (9, 20, 9))
        features, anchors = (torch.randn(n, width, generator=random) for n in (rows, classes))
        anchors.view(-1)[case % anchors.numel()] *= 10.0 ** (case % 8)
        cholesky = torch.linalg.cholesky(torch.eye(width) * (1 + case % 3) + 0.05)
        centre = anchors.double().mean(0)
        y, v = (
            torch.linalg.solve_triangular(cholesky.double(), (x.double() - centre).mT, upper=False).mT
            for x in (features, anchors)
        )
        squares = torch.cdist(y, v, compute_mode="donot_use_mm_for_euclid_dist").square()
        scale = torch.maximum(y.square().sum(1), v.square().sum(1).max())
        directions = [torch.nn.functional.normalize(x.double()) for x in (features, anchors)]
        cosines = directions[0] @ directions[1].mT
        result = operator(features, anchors, cholesky)
        for table, chosen, limit in (
            (squares, (result.nearest, result.second), 1e-6 * scale),
            (-cosines, (result.most_similar, result.second_similar), torch.full((rows,), 1e-6)),
        ):
            ordered = table.sort(-1).values
            for place in range(min(2, classes)):
                excess = table.gather(1, chosen[place][:, None])[:, 0] - ordered[:, place]
                assert (excess <= limit).all()
