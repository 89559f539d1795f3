"""Mixture without groups, and its floor against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from tadperf.kernels import mixture

pytestmark = pytest.mark.usefixtures("one_thread")


def peaked() -> torch.Tensor:
    """Returns losses with a peak at 0, as of a network in training."""
    torch.manual_seed(0)
    right = torch.rand(4000) < 0.8
    return torch.where(right, torch.distributions.Gamma(0.3, 1.0).sample((4000,)), 3 + 1.5 * torch.randn(4000).abs())


def test_samples_without_groups_are_one_group():
    losses = peaked()
    expected = mixture(losses, torch.zeros(4000, dtype=torch.int64), 1)
    for found in (mixture(losses), mixture(losses.view(40, 100))):
        assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(found, expected, strict=True))
    assert mixture(losses.view(40, 100)).posterior.shape == (40, 100)
    assert mixture(losses, num_groups=2).weight[1].isnan().all()
    assert torch.equal(torch.compile(mixture, backend="eager")(losses).posterior, expected.posterior)


def test_the_floor_is_reg_covar_as_a_share_of_the_variance():
    losses, reg_covar = peaked(), 0.05
    found = mixture(losses, floor=reg_covar / float(losses.double().var(correction=0)))
    fit = GaussianMixture(2, tol=1e-10, max_iter=5000, reg_covar=reg_covar, random_state=0).fit(losses[:, None].numpy())
    means, weights = np.asarray(fit.means_)[:, 0], np.asarray(fit.weights_)
    order = means.argsort()
    assert found.mean[0].tolist() == pytest.approx(means[order].tolist(), abs=1e-3)
    assert found.weight[0].tolist() == pytest.approx(weights[order].tolist(), abs=1e-3)


def test_a_small_floor_shrinks_onto_the_peak():
    """The docstring's warning: 80 % of the losses belong to the lower component."""
    assert float(mixture(peaked(), floor=1e-2).weight[0, 0]) > float(mixture(peaked()).weight[0, 0]) + 0.1
