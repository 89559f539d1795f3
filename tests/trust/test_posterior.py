"""The pool of sources: weights and the transition matrix by likelihood."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tadperf.trust.neighbours import PRIOR, NeighbourEstimate
from tadperf.trust.posterior import (
    PRIOR_DEVIATION,
    PRIOR_WEIGHT,
    _likelihood,
    _newton_step,
    fit_weights,
    pool_classes,
    posterior_of,
    without_own_label,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES, COUNT = 5, 6000


def sample(seed: int = 0, noise: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log probabilities of a calibrated source [N, C], given labels (class c becomes c + 1), clean labels."""
    generator = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(COUNT, CLASSES, generator=generator)).softmax(1)
    clean = torch.multinomial(p, 1, generator=generator).squeeze(1)
    wrong = torch.rand(COUNT, generator=generator) < noise
    return p.log(), torch.where(wrong, (clean + 1) % CLASSES, clean), clean


def accuracy(p: Tensor, clean: Tensor) -> float:
    return float((p.argmax(1) == clean).float().mean())


def test_weights_and_transition_of_a_calibrated_source():
    """The source gives the true probabilities, so its weight is near 1 and T is the matrix that made the labels.

    The prior of T makes T softer than it was, which makes the weight a little larger.
    """
    source, labels, clean = sample()
    pool = pool_classes([source], labels, 0)
    assert 0.95 < pool.weights[0] < 1.3
    expected = 0.6 * torch.eye(CLASSES) + 0.4 * torch.eye(CLASSES).roll(1, 1)
    torch.testing.assert_close(pool.transition, expected, atol=0.08, rtol=0)
    exact = source.exp() * expected.T[labels]
    assert (pool.posterior - exact / exact.sum(1, keepdim=True)).abs().mean() < 0.05
    # The likeliest class given the label is right more often than without the label.
    assert accuracy(pool.posterior, clean) > accuracy(pool.blind, clean) + 0.05


def test_an_overconfident_source_gets_a_small_weight_and_a_useless_one_nearly_none():
    source, labels, clean = sample()
    generator = torch.Generator().manual_seed(1)
    useless = (4 * torch.randn(COUNT, CLASSES, generator=generator)).log_softmax(1)
    pool = pool_classes([(4 * source).log_softmax(1), useless], labels, 0)
    assert 0.23 < pool.weights[0] < 0.33
    assert pool.weights[1] < 0.02
    alone = pool_classes([source], labels, 0)
    assert accuracy(pool.posterior, clean) > accuracy(alone.posterior, clean) - 0.01


def test_two_views_of_the_same_samples_are_better_than_one():
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(COUNT) % CLASSES
    centres = torch.eye(CLASSES)[clean]
    sources = [(2 * (centres + torch.randn(COUNT, CLASSES, generator=generator))).log_softmax(1) for _ in range(2)]
    labels = torch.where(torch.rand(COUNT, generator=generator) < 0.4, (clean + 1) % CLASSES, clean)
    both, one = pool_classes(sources, labels, 0), pool_classes(sources[:1], labels, 0)
    assert both.weights[0] == pytest.approx(both.weights[1], rel=0.2)
    assert accuracy(both.posterior, clean) > accuracy(one.posterior, clean) + 0.03


def test_few_labels_leave_the_weights_near_the_prior():
    source, labels, _ = sample()
    weights = pool_classes([source[:5], source[:5]], labels[:5], 0).weights
    assert weights == pytest.approx((PRIOR_WEIGHT, PRIOR_WEIGHT), abs=PRIOR_DEVIATION)


def test_sources_that_have_seen_the_labels_are_not_weighed():
    source, labels, _ = sample()
    leak = torch.nn.functional.one_hot(labels, CLASSES).float().mul(5).log_softmax(1)
    assert pool_classes([source, leak], labels, 0, fitted=False).weights == (1.0, 1.0)


def test_the_newton_step_is_the_gradient_of_the_likelihood_over_its_curvature():
    source, labels, _ = sample()
    generator = torch.Generator().manual_seed(2)
    sources = torch.stack([source, torch.randn(COUNT, CLASSES, generator=generator).log_softmax(1)]).double()
    weights = torch.tensor([0.8, 0.3], dtype=torch.float64, requires_grad=True)
    t = (0.6 * torch.eye(CLASSES) + 0.08).double()
    t = t / t.sum(1, keepdim=True)
    blind = torch.tensordot(weights, sources, 1).softmax(1)
    total = (blind * t.T[labels]).sum(1).log().sum()
    total = total - ((weights - PRIOR_WEIGHT) / PRIOR_DEVIATION).square().sum() / 2
    (gradient,) = torch.autograd.grad(total, weights)
    detached = weights.detach()
    blind, value = _likelihood(sources, labels, detached, t)
    assert value == pytest.approx(float(total.detach()) / COUNT, rel=1e-6)
    step = _newton_step(sources, detached, blind, posterior_of(blind, t, labels))
    assert (step * gradient).sum() > 0
    better, _ = fit_weights(sources.float(), labels, PRIOR)
    worse = _likelihood(sources.float(), labels, better + torch.tensor([0.3, 0.0]), t.float())
    assert _likelihood(sources.float(), labels, better, t.float())[1] > worse[1]


def test_a_part_of_the_samples_fits_the_weights(monkeypatch):
    source, labels, _ = sample()
    whole = pool_classes([source], labels, 0)
    monkeypatch.setattr("tadperf.trust.posterior.SELECTION_SIZE", 3000 * CLASSES)
    part = pool_classes([source], labels, 0)
    torch.testing.assert_close(part.transition, whole.transition, atol=0.03, rtol=0)
    torch.testing.assert_close(part.posterior, whole.posterior, atol=0.1, rtol=0)


def test_the_own_label_is_taken_out_of_the_neighbours_estimate():
    generator = torch.Generator().manual_seed(0)
    blind = torch.rand(50, CLASSES, generator=generator).softmax(1)
    t = torch.rand(CLASSES, CLASSES, generator=generator).softmax(1)
    labels = torch.arange(50) % CLASSES
    joint = blind * t.T[labels]
    estimate = NeighbourEstimate(joint / joint.sum(1, keepdim=True), t, 0.5, 2.0)
    torch.testing.assert_close(without_own_label(estimate, labels).exp(), blind)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_very_few_samples(count):
    pool = pool_classes([torch.zeros(count, 2)], torch.zeros(count, dtype=torch.int64), 0)
    assert pool.posterior.isfinite().all()
    torch.testing.assert_close(pool.posterior.sum(1), torch.ones(count))
