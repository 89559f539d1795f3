"""The inner loop: anchors, their covariance, calibrated margins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from tadperf.trust.recalibrate import (
    PRECISION,
    PRIOR_SAMPLES,
    Recalibration,
    fit_anchors,
    lowest_margin,
    recalibrate,
    shrunk_cholesky,
    vote_strength,
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


def check(z: Tensor, labels: Tensor, classes: Tensor, used: Tensor, num_classes: int = 3) -> Recalibration:
    """Checks `classes` by anchors of the used samples. The other sources agree with the classes, and are confident."""
    confident = torch.ones(len(z), dtype=torch.bool)
    return recalibrate(z, labels, used.float(), classes, classes, confident, num_classes)


def test_both_measures_name_the_class_of_the_cloud():
    z, clean = clouds()
    labels = clean.clone()
    labels[:12] = (clean[:12] + 1) % 3
    used = torch.arange(len(z)) >= 24
    right = check(z, labels, clean, used)
    assert right.clear.all()
    assert (right.strength == 1).all()
    wrong = check(z, labels, (clean + 1) % 3, used)
    assert not wrong.clear.any()


def test_a_sample_between_the_anchors_is_not_clear():
    z, clean = clouds(spread=1.5)
    middle = torch.stack([z[clean == c].mean(0) for c in (0, 1)]).mean(0)
    z, classes = torch.cat([z, middle[None]]), torch.cat([clean, torch.tensor([0])])
    labels = classes.clone()
    labels[::10] = (labels[::10] + 1) % 3  # so that some anchors' samples are wrong
    used = torch.ones(len(z), dtype=torch.bool)
    used[-1] = False
    result = check(z, labels, classes, used)
    assert not result.clear[-1]
    assert result.clear.any()


def test_the_strength_of_votes_is_the_share_of_right_classes():
    """Symmetric noise of 80 %: the class is right for 90 % of the samples with two votes, and for 45 % with one."""
    generator = torch.Generator().manual_seed(0)
    count, classes = 400_000, 10
    votes = torch.where(torch.rand(count, generator=generator) < 0.5, 2, 1)
    right = torch.rand(count, generator=generator) < torch.where(votes == 2, 0.9, 0.45)
    kept = torch.rand(count, generator=generator) < 0.2
    # A wrong class equals a kept label never, and one that was drawn from the other nine classes by chance.
    by_chance = torch.rand(count, generator=generator) < 1 / 9
    equal = torch.where(right, kept, ~kept & by_chance)
    strength = vote_strength(votes, equal, torch.ones(count, dtype=torch.bool), classes)
    torch.testing.assert_close(strength[1], torch.tensor(0.45), atol=0.03, rtol=0)
    assert strength[2] == 1
    assert strength[0] < 0.1  # no samples: only the prior
    few = vote_strength(votes[:4], equal[:4], torch.ones(4, dtype=torch.bool), classes)
    assert (few.diff() >= 0).all()


def test_votes_of_few_samples_count_by_the_prior():
    votes = torch.tensor([2] * 1000 + [1])
    equal = torch.ones(1001, dtype=torch.bool)
    strength = vote_strength(votes, equal, equal, 10)
    expected = (0.9 + PRIOR_SAMPLES * 0.9 * 0.5) / ((1 + PRIOR_SAMPLES) * 0.9)
    torch.testing.assert_close(strength, torch.tensor([0.0, expected, 1.0]))
    nobody = vote_strength(votes, equal, torch.zeros(1001, dtype=torch.bool), 10)
    torch.testing.assert_close(nobody, torch.tensor([0.0, 0.5, 1.0]))


def test_lowest_margin_by_hand():
    margin = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 9.0])
    right = torch.tensor([True, True, True, False, True, False])
    used = torch.tensor([True, True, True, True, True, False])
    assert PRECISION > 0.8
    assert lowest_margin(margin, right, used) == 3.0  # below it 3 of 4, then 4 of 5 are right
    assert lowest_margin(margin, right, torch.zeros(6, dtype=torch.bool)) == torch.inf
    assert lowest_margin(margin, torch.zeros(6, dtype=torch.bool), used) == torch.inf


def test_one_class():
    z, _ = clouds(1)
    zeros = torch.zeros(60, dtype=torch.int64)
    result = check(z, zeros, zeros, torch.ones(60, dtype=torch.bool), 2)
    assert result.clear.all()
    assert (result.strength == 1).all()


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
    used = torch.arange(len(z)) >= 12
    half, exact = check(z.to(dtype), labels, clean, used), check(z.to(dtype).float(), labels, clean, used)
    assert torch.equal(half.strength, exact.strength)
    assert (half.clear == exact.clear).float().mean() > 0.98
    assert half.clear[:12].all()
