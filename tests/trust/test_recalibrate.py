"""The inner loop: anchors, their covariance, calibrated margins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from tadperf.trust.recalibrate import (
    PRECISION,
    calibrate_margin,
    fit_anchors,
    rank_within,
    recalibrate,
    shrunk_cholesky,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def clouds(classes: int = 3, each: int = 60, spread: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(classes).repeat(each)
    centres = 2 * torch.randn(classes, 12, generator=generator)
    return centres[clean] + spread * torch.randn(len(clean), 12, generator=generator), clean


@pytest.mark.parametrize(("count", "size"), [(200, 8), (30, 40), (1, 5), (500, 64)])
def test_covariance_equals_sklearn(count, size):
    z = torch.randn(count, size, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    z = z @ torch.diag(torch.linspace(0.1, 3, size, dtype=torch.float64))
    factor = shrunk_cholesky(z.float().__getitem__, count, size, z.device).double()
    shrinkage = ledoit_wolf_shrinkage(z.numpy(), assume_centered=True)
    sample = (z.T @ z / count).numpy()
    expected = (1 - shrinkage) * sample + shrinkage * np.trace(sample) / size * np.eye(size)
    np.testing.assert_allclose((factor @ factor.T).numpy(), expected, rtol=1e-3, atol=2e-5 * np.abs(expected).max())


def test_covariance_of_zeros_is_positive_definite():
    factor = shrunk_cholesky(torch.zeros(5, 4).__getitem__, 5, 4, torch.device("cpu"))
    assert (factor.diagonal() > 0).all()


def test_anchors_are_weighted_means_and_empty_classes_have_no_anchor():
    z, clean = clouds()
    weight = torch.rand(len(z), generator=torch.Generator().manual_seed(1)) * (clean != 2)
    anchors = fit_anchors(z, clean, weight, 5)
    assert anchors.classes.tolist() == [
        0,
        1,
        2,
    ]  # class 2 has no weight, so its samples get weight 1; classes 3 and 4 have no samples
    for c in (0, 1):
        own = clean == c
        mean = (z[own] * weight[own, None]).sum(0) / weight[own].sum()
        torch.testing.assert_close(anchors.means[c], mean)
    torch.testing.assert_close(anchors.means[2], z[clean == 2].mean(0))


def test_wrong_labels_get_the_class_of_their_cloud():
    z, clean = clouds()
    labels = clean.clone()
    labels[:12] = (clean[:12] + 1) % 3
    trusted = torch.ones(len(z), dtype=torch.bool)
    trusted[:24] = False
    result = recalibrate(z, labels, trusted, torch.ones(len(z)), 3)
    assert torch.equal(result.candidate[:24], clean[:24])
    assert (result.strength[:24] >= PRECISION).all()
    assert (result.reliability[:24] == 0).all()
    assert (result.reliability[24:] == 1).all()


def test_a_sample_between_the_anchors_has_no_candidate():
    z, clean = clouds(spread=1.5)
    middle = torch.stack([z[clean == c].mean(0) for c in (0, 1)]).mean(0)
    z = torch.cat([z, middle[None]])
    labels = torch.cat([clean, torch.tensor([0])])
    labels[::10] = (labels[::10] + 1) % 3  # so that some trusted samples are wrong
    trusted = torch.ones(len(z), dtype=torch.bool)
    trusted[-1] = False
    assert recalibrate(z, labels, trusted, torch.ones(len(z)), 3).candidate[-1] == -1


def test_a_trusted_sample_far_from_its_class_has_low_reliability():
    z, clean = clouds()
    labels = clean.clone()
    labels[0] = (clean[0] + 1) % 3  # trusted by mistake
    posterior = torch.full((len(z),), 0.9)
    result = recalibrate(z, labels, torch.ones(len(z), dtype=torch.bool), posterior, 3)
    assert result.reliability[0] < 0.1
    torch.testing.assert_close(result.reliability[1:], posterior[1:])


def test_calibrated_margins_by_hand():
    margin = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    right = torch.tensor([True, True, True, True, False, True])
    trusted = torch.tensor([True, True, True, True, True, False])
    strength, floor = calibrate_margin(margin, right, trusted)
    assert floor == 2.0
    torch.testing.assert_close(strength, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.8, 0.8]))
    strength, floor = calibrate_margin(margin, right, torch.zeros(6, dtype=torch.bool))
    assert (strength == 0).all()
    assert floor == float("inf")


def test_ranks_run_from_zero_to_one_in_each_group():
    values = torch.tensor([3.0, 1.0, 2.0, 9.0, 7.0, 4.0])
    groups = torch.tensor([0, 0, 0, 2, 2, 5])
    assert rank_within(values, groups).tolist() == [1.0, 0.0, 0.5, 1.0, 0.0, 0.0]


def test_one_class():
    z, _ = clouds(1)
    result = recalibrate(z, torch.zeros(60, dtype=torch.int64), torch.ones(60, dtype=torch.bool), torch.ones(60), 2)
    assert (result.candidate == 0).all()


def test_blocks_do_not_change_the_result(monkeypatch):
    z, clean = clouds(each=70)
    weight = torch.rand(len(z), generator=torch.Generator().manual_seed(1)).where(clean != 1, 0.0)
    whole = fit_anchors(z, clean, weight, 3)
    monkeypatch.setattr("tadperf.trust.recalibrate.BLOCK", 13 * z.shape[1])
    parts = fit_anchors(z, clean, weight, 3)
    torch.testing.assert_close(parts.means, whole.means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.cholesky, whole.cholesky, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features(dtype):
    z, clean = clouds(spread=0.3)
    labels = clean.clone()
    labels[:12] = (clean[:12] + 1) % 3
    trusted = torch.ones(len(z), dtype=torch.bool)
    trusted[:12] = False
    half = recalibrate(z.to(dtype), labels, trusted, torch.ones(len(z)), 3)
    exact = recalibrate(z.to(dtype).float(), labels, trusted, torch.ones(len(z)), 3)
    assert torch.equal(half.candidate, exact.candidate)
    torch.testing.assert_close(half.reliability, exact.reliability, rtol=0, atol=0.05)
