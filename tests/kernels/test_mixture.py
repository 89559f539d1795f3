from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import expit, logsumexp
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from tadperf.kernels import mixture, mixture_reference, native
from tadperf.kernels.ops.mixture import (
    MAX_CUTS,
    SLACK,
    SMALLEST_PART,
    TINY,
    Mixture,
    _empty,
    _operator,
    _start,
)

INF, NAN = float("inf"), float("nan")
compiled = native.module()
ISAS = range(len(compiled.isas())) if compiled else ()
needs_native = pytest.mark.skipif(compiled is None, reason=native.reason())
THREE = torch.zeros(3, dtype=torch.int64)
OPERATORS = pytest.mark.parametrize("operator", [mixture, mixture_reference])


def separate(random, n, noisy):
    """Returns losses from two Gaussians that are some standard deviations apart."""
    k = round(n * noisy)
    return np.concatenate([random.normal(0.3, 0.2, n - k), random.normal(3, 0.8, k)])


def early(random, n, noisy):
    """Returns losses like those of a network in its first epochs: two skewed distributions that overlap."""
    k = round(n * noisy)
    return np.concatenate([random.gamma(1.2, 0.5, n - k), random.gamma(6, 0.6, k)])


def late(random, n, noisy):
    """Returns losses like those of a trained network: most are near 0, over orders of magnitude, the rest are large."""
    k = round(n * noisy)
    return np.concatenate([np.exp(random.normal(-6, 2, n - k)), random.normal(5, 1.5, k).clip(0.01)])


def group_of(losses, group=0):
    x = torch.as_tensor(np.asarray(losses, dtype=np.float32))
    return x, torch.full((len(x),), group)


def oracle(losses, floor=1e-6, start=None):
    """Fits sklearn's mixture on standardised float64 losses; returns (posterior, model).

    start: log odds, two means and two log variances, all of standardised losses; by default the start of the operator.
    """
    x = losses.double().numpy()
    z = torch.as_tensor((x - x.min()) / (x.max() - x.min()))
    theta, added = (
        t[0].numpy() for t in _start(z, torch.zeros(len(z), dtype=torch.int64), torch.tensor([len(z)]), floor)
    )
    theta = theta if start is None else start
    weight = expit(theta[0])
    model: Any = GaussianMixture(  # its attributes are declared None before a fit
        2,
        tol=1e-14,
        max_iter=10_000,
        reg_covar=float(added),
        weights_init=[weight, 1 - weight],
        means_init=theta[1:3, None],
        precisions_init=np.exp(-theta[3:])[:, None, None],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(z[:, None].numpy())
    return model.predict_proba(z[:, None].numpy())[:, model.means_[:, 0].argmin()], model


def standardised(found, losses):
    """Returns the parameters of a fit of one group as a start of `oracle`."""
    low, span = float(losses.min()), float(losses.double().max() - losses.double().min())
    weight, mean, variance = (t[0].double().numpy() for t in (found.weight, found.mean, found.variance))
    return np.concatenate([[np.log(weight[0] / weight[1])], (mean - low) / span, np.log(variance / span**2)])


def assert_agrees(posterior, wanted, atol=1e-4):
    ours = posterior.double().numpy()
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=atol)
    decided = np.abs(wanted - 0.5) > atol
    assert ((ours > 0.5) == (wanted > 0.5))[decided].all()


def run_native(losses, groups, num_groups, isa, threads, monotone=False):
    out = _empty(losses, num_groups)
    options = 10_000, 1e-7, 1e-6, monotone, SLACK, TINY, MAX_CUTS, SMALLEST_PART
    assert native.call("mixture", losses, groups, *out, *options, isa=isa, threads=threads) == -1
    return out


def same_bits(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def assert_same(results, expected, atol=1e-6):
    for name, result, wanted in zip(Mixture._fields, results, expected, strict=True):
        if name != "iterations":  # rounding may end a fit one round earlier or later
            torch.testing.assert_close(result.to(wanted.dtype), wanted, atol=atol, rtol=atol, equal_nan=True)


@pytest.mark.parametrize("make", [separate, early, late])
@pytest.mark.parametrize("noisy", [0.05, 0.4, 0.95])
def test_equals_sklearn_run_to_convergence(make, noisy):
    random = np.random.default_rng(round(100 * noisy))
    losses, groups = group_of(make(random, 1000, noisy))
    results = mixture(losses, groups, 1)
    wanted, model = oracle(losses)
    assert_agrees(results.posterior, wanted)
    order = model.means_[:, 0].argsort()
    span, low = float(losses.max() - losses.min()), float(losses.min())
    np.testing.assert_allclose(results.weight[0], model.weights_[order], atol=1e-4)
    np.testing.assert_allclose(results.mean[0], model.means_[order, 0] * span + low, rtol=1e-3)
    np.testing.assert_allclose(results.variance[0], model.covariances_[order, 0, 0] * span**2, rtol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(20, 300), st.floats(0.1, 0.9), st.floats(1, 6), st.floats(0.3, 3), st.booleans()
)
@example(6408, 20, 0.84375, 3.078125, 2.34375, True)  # two optima, 0.04 nats apart
def test_random_mixtures_equal_sklearn(seed, n, noisy, apart, ratio, heavy):
    random = np.random.default_rng(seed)
    k = max(1, round(n * noisy))
    low = np.abs(random.standard_t(3, n - k)) if heavy else random.normal(size=n - k)
    losses, groups = group_of(np.concatenate([low, apart + 2 + ratio * random.normal(size=k)]))
    wanted, model = oracle(losses)
    if model.n_iter_ < 2000:  # otherwise sklearn itself has not converged
        found, span = mixture(losses, groups, 1), float(losses.double().max() - losses.double().min())
        theirs = n * (model.score((losses.double().numpy()[:, None] - float(losses.min())) / span) - np.log(span))
        if abs(float(found.log_likelihood) - theirs) > 1e-3:  # the longer steps have led to another optimum
            wanted, _ = oracle(losses, start=standardised(found, losses))  # where sklearn must stay
        assert_agrees(found.posterior, wanted)


@pytest.mark.parametrize("noisy", [0.05, 0.2, 0.5, 0.8, 0.95])
def test_finds_the_noisy_samples(noisy):
    """Finds components that are some standard deviations apart, for any weights of the two."""
    random = np.random.default_rng(0)
    losses, groups = group_of(separate(random, 4000, noisy))
    results = mixture(losses, groups, 1)
    noisy_ones = torch.arange(4000) >= 4000 - round(4000 * noisy)
    assert ((results.posterior < 0.5) == noisy_ones).double().mean() > 0.985
    np.testing.assert_allclose(results.weight[0], [1 - noisy, noisy], atol=0.01)
    np.testing.assert_allclose(results.mean[0], [0.3, 3], atol=0.12)


def test_a_far_outlier_does_not_take_a_component():
    """Two-means alone would give the outlier a component of its own."""
    losses, groups = group_of(np.append(separate(np.random.default_rng(0), 999, 0.3), 30))
    weight = mixture(losses, groups, 1).weight[0]
    assert 0.25 < weight[1] < 0.75


@OPERATORS
def test_log_likelihood_and_posterior_are_those_of_the_parameters(operator):
    losses, groups = group_of(early(np.random.default_rng(1), 500, 0.3))
    results = operator(losses, groups, 1)
    weight, mean, variance = (t[0].numpy() for t in results[1:4])
    logs = np.log(weight) + norm.logpdf(losses.double().numpy()[:, None], mean, np.sqrt(variance))
    assert results.log_likelihood.item() == pytest.approx(np.sum(logsumexp(logs, 1)), rel=1e-9)
    np.testing.assert_allclose(results.posterior, expit(logs[:, 0] - logs[:, 1]), atol=1e-6)


def many_groups(seed=0, sizes=(0, 1, 2, 3, 7, 127, 129, 252, 507, 4096, 4097, 20_000)):
    """Returns groups of many sizes in random order, with samples that are ignored."""
    random = np.random.default_rng(seed)
    losses = np.concatenate([early(random, n, 0.3) for n in sizes])
    groups = np.repeat(np.arange(len(sizes)), sizes)
    order = random.permutation(len(losses))
    losses, groups = losses[order], groups[order]
    losses[::97], losses[1::97], losses[2::97], groups[3::97] = NAN, INF, -INF, -1
    return torch.as_tensor(losses, dtype=torch.float32), torch.as_tensor(groups), len(sizes)


def test_native_equals_reference():
    losses, groups, count = many_groups()
    assert_same(mixture(losses, groups, count), mixture_reference(losses, groups, count), atol=1e-5)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_any_number_of_threads(isa):
    """Many groups at a time, and one group that is so large that threads share its samples."""
    for losses, groups, count in (many_groups(), (*group_of(separate(np.random.default_rng(0), 140_000, 0.3)), 1)):
        one = run_native(losses, groups, count, isa, 1)
        for threads in (2, 3, 7):
            assert same_bits(one, run_native(losses, groups, count, isa, threads))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("monotone", [False, True])
def test_every_instruction_set(isa, monotone):
    losses, groups, count = many_groups(1, sizes=(0, 1, 2, 3, 5, 7, 9, 127, 129, 252, 507, 1030))
    expected = mixture_reference(losses, groups, count, monotone=monotone)
    assert_same(run_native(losses, groups, count, isa, 1, monotone), expected, atol=1e-5)


@OPERATORS
def test_losses_that_are_not_finite(operator):
    losses, groups = group_of(separate(np.random.default_rng(0), 200, 0.3))
    clean = operator(losses, groups, 3)
    hard = torch.tensor([NAN, INF, -INF, NAN, INF, 0.5, -INF])
    where = torch.tensor([0, 0, 0, 2, 2, -1, -1], dtype=torch.int64)
    results = operator(torch.cat([hard, losses]), torch.cat([where, groups]), 3)
    np.testing.assert_array_equal(results.posterior[:7], [NAN, 0, 1, NAN, 0, NAN, NAN])
    assert same_bits(results[1:], clean[1:])
    assert torch.equal(results.posterior[7:], clean.posterior)
    for result in (results.weight, results.mean, results.variance, results.log_likelihood):
        assert result[1:].isnan().all()
    assert results.iterations[1:].tolist() == [0, 0]


@OPERATORS
@pytest.mark.parametrize("losses", [[2.5], [2.5] * 9, [0.0] * 100, [-3e38] * 2])
def test_equal_losses_are_one_component(operator, losses):
    results = operator(torch.tensor(losses), torch.zeros(len(losses), dtype=torch.int64), 1)
    assert results.posterior.tolist() == [1] * len(losses)
    assert results.weight.tolist() == [[1, 0]]
    assert (results.mean == torch.tensor(losses[0])).all()
    assert results.variance.tolist() == [[0, 0]]
    assert results.iterations.tolist() == [0]
    assert results.log_likelihood.isnan().all()


@OPERATORS
def test_two_distinct_losses_are_two_components(operator):
    results = operator(torch.tensor([5.0, 1.0]), torch.zeros(2, dtype=torch.int32), 1)
    assert results.posterior.tolist() == [0, 1]
    np.testing.assert_allclose(results.mean, [[1, 5]], rtol=1e-6)
    np.testing.assert_allclose(results.variance, [[4e-6, 4e-6]], rtol=1e-6)


@OPERATORS
def test_no_samples(operator):
    results = operator(torch.empty(0), torch.empty(0, dtype=torch.int64), 4)
    assert results.posterior.shape == (0,)
    assert results.weight.shape == (4, 2)
    assert results.weight.isnan().all()


@OPERATORS
def test_scale_shift_and_order_change_no_posterior(operator):
    random = np.random.default_rng(3)
    x = np.tile(early(random, 300, 0.3), 3)
    groups = torch.arange(3).repeat_interleave(300)
    scaled = torch.as_tensor(x * np.repeat([1e-6, 1, 1e6], 300) + np.repeat([0, -7, 1e6], 300))
    a, b, c = operator(scaled, groups, 3).posterior.view(3, 300)
    torch.testing.assert_close(a, b, atol=1e-7, rtol=0)
    torch.testing.assert_close(b, c, atol=1e-7, rtol=0)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    plain, shuffled = operator(scaled, groups, 3).posterior, operator(scaled[order], groups[order], 3).posterior
    torch.testing.assert_close(shuffled, plain[order], atol=1e-7, rtol=0)


@OPERATORS
def test_monotone_changes_the_posterior_only_beyond_the_means(operator):
    """The lower component is narrow, so the posterior turns below its mean. Mirrored, it turns above the upper mean."""
    random = np.random.default_rng(0)
    x = np.sort(np.concatenate([random.normal(0, 0.3, 500), random.normal(2, 2, 500)]))
    for losses, groups in (group_of(x), group_of(np.sort(-x))):
        plain, held = operator(losses, groups, 1), operator(losses, groups, 1, monotone=True)
        assert plain.posterior.diff().max() > 1e-3
        assert held.posterior.diff().max() <= 1e-7
        between = (losses >= plain.mean[0, 0]) & (losses <= plain.mean[0, 1])
        assert torch.equal(plain.posterior[between], held.posterior[between])
        assert same_bits(plain[1:], held[1:])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape_stride_and_type(data):
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3), label="shape")
    step = data.draw(st.integers(1, 3), label="stride")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]), label="type")
    groups_dtype = data.draw(st.sampled_from([torch.int32, torch.int64]), label="group type")
    count = data.draw(st.integers(1, 5), label="groups")
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    losses = torch.randn(*shape, step, generator=random).exp().to(dtype)[..., 0]
    groups = torch.randint(-1, count, (*shape, step), generator=random, dtype=groups_dtype)[..., 0]
    results, expected = mixture(losses, groups, count), mixture_reference(losses.double(), groups, count)
    assert results.posterior.shape == losses.shape
    assert results.posterior.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found = results.iterations < 1000  # a slow fit may stop at another point of a flat maximum
    settled = (groups < 0) | found[groups.clamp(min=0).long()]
    torch.testing.assert_close(
        results.posterior.double()[settled], expected.posterior[settled], atol=1e-4, rtol=0, equal_nan=True
    )
    torch.testing.assert_close(results.mean[found], expected.mean[found], atol=1e-3, rtol=1e-3, equal_nan=True)


def skewed(seed):
    """Returns normal losses or their exponentials. The two components overlap, so EM takes about 1000 steps."""
    random = torch.Generator().manual_seed(seed)
    n = int(torch.randint(4, 400, (1,), generator=random))
    x = torch.randn(n, generator=random)
    x = x.exp() if seed % 2 else x
    return x.bfloat16().float() if seed % 3 == 0 else x


@pytest.mark.parametrize("seed", [6, 614, 758])
def test_on_a_flat_likelihood_both_forms_are_near_the_same_maximum(seed):
    """The distance to the maximum is estimated from two steps, so the forms stop up to 2.5e-4 apart. Neither is wrong:
    their log-likelihoods are the same to 1e-8, and with a smaller tolerance both end at the same point."""
    x = skewed(seed)
    groups = torch.zeros(len(x), dtype=torch.int64)
    fine = [f(x.double(), groups, 1, tolerance=1e-12, iterations=60_000) for f in (mixture_reference, mixture)]
    fine.append(mixture(x, groups, 1, tolerance=1e-12, iterations=60_000))
    exact = fine[0].posterior
    for found in fine:
        assert found.iterations < 10_000
        torch.testing.assert_close(found.posterior.double(), exact, atol=1e-6, rtol=0)
    for form in (mixture, mixture_reference):
        found = form(x, groups, 1)
        assert (found.posterior.double() - exact).abs().max() < 2.5e-4
        assert (found.log_likelihood - fine[0].log_likelihood).abs() < 1e-8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_read_exactly(dtype):
    """Every bit pattern of the type gives the same results as its value in float32."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    groups = torch.arange(2**16) % 3
    assert same_bits(mixture(values, groups, 3), mixture(values.float(), groups, 3))


def test_iterations_and_tolerance():
    losses, groups = group_of(early(np.random.default_rng(0), 2000, 0.4))
    full = mixture(losses, groups, 1)
    assert 20 < full.iterations.item() < 100
    assert mixture(losses, groups, 1, iterations=10).iterations.item() == 9
    loose = mixture(losses, groups, 1, tolerance=1e-2)
    assert loose.iterations.item() < full.iterations.item()
    assert (loose.posterior - full.posterior).abs().max() < 0.05
    assert mixture(losses, groups, 1, iterations=30, tolerance=0).iterations.item() == 30


@OPERATORS
@pytest.mark.parametrize(
    ("losses", "groups", "count", "options", "message"),
    [
        (THREE, THREE, 1, {}, "losses: torch.int64 (3,): expected floats"),
        (torch.zeros(3), THREE[:2], 1, {}, "groups: torch.int64 (2,): expected int32 or int64 (3,)"),
        (torch.zeros(3), torch.zeros(3), 1, {}, "groups: torch.float32 (3,): expected int32 or int64"),
        (torch.zeros(30), torch.arange(30) // 5, 4, {}, "groups: 4 at sample 20: expected 0 to 3, or -1 to ignore"),
        (torch.zeros(30), torch.arange(30) - 2, 40, {}, "groups: -2 at sample 0: expected 0 to 39, or -1 to ignore"),
        (torch.zeros(3), THREE, 0, {}, "num_groups: 0: expected 1 or more"),
        (torch.zeros(3), THREE, 1, {"iterations": 2}, "iterations: 2: expected 3 or more"),
        (torch.zeros(3), THREE, 1, {"tolerance": NAN}, "tolerance: nan: expected 0 or more"),
        (torch.zeros(3), THREE, 1, {"floor": 0.0}, "floor: 0.0: expected more than 0"),
    ],
)
def test_wrong_use(operator, losses, groups, count, options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011, the message is compared below
        operator(losses, groups, count, **options)
    assert message in str(error.value)


@needs_native
def test_first_wrong_group_is_named_on_any_number_of_threads():
    groups = torch.zeros(100_000, dtype=torch.int64)
    groups[[40_000, 90_000]] = 7
    with pytest.raises(ValueError, match="groups: 7 at sample 40000"):
        mixture(torch.zeros(100_000), groups, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    losses, groups = group_of(separate(np.random.default_rng(0), 40, 0.3))
    torch.library.opcheck(_operator, (losses.to(dtype), groups, 1, 300, 1e-7, 1e-6, False))


def test_full_graph_equals_eager():
    def keep(losses, groups):
        results = mixture(losses * 2, groups, 3)
        return (results.posterior > 0.5).sum(), results

    losses, groups = group_of(separate(np.random.default_rng(0), 60, 0.3), 1)
    count, traced = torch.compile(keep, fullgraph=True, backend="aot_eager")(losses, groups)
    expected, results = keep(losses, groups)
    assert count == expected
    assert same_bits(traced, results)
