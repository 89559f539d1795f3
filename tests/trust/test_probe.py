"""Out-of-fold probabilities from features: the ridge probe, the pool, and features that are read in blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tadperf import seeds
from tadperf.trust import probe
from tadperf.trust.probe import FOLDS, PENALTIES, SCALES, Standardised, pool, pool_features, ridge_probabilities

pytestmark = pytest.mark.usefixtures("one_thread")


def clusters(count: int = 400, classes: int = 4, width: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns features around the centre of each class, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    features = 2 * rng.normal(size=(classes, width))[labels] + rng.normal(size=(count, width))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def direct_ridge(x: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Solves the ridge of every fold from the whole matrix in float64, and chooses penalty and scale by likelihood."""
    x, targets = x.double(), F.one_hot(labels, classes).double()
    z = (x - x.mean(0)) / x.std(0, correction=0)
    fold = torch.randperm(len(z), generator=seeds.generator(0, "folds")) % FOLDS
    scores = z.new_empty(len(PENALTIES), len(z), classes)
    for f in range(FOLDS):
        train, mean, share = fold != f, z[fold != f].mean(0), targets[fold != f].mean(0)
        a = z[train] - mean
        covariance = a.T @ a
        for number, penalty in enumerate(PENALTIES):
            shift = penalty * covariance.trace() / len(covariance) * torch.eye(len(covariance))
            weights = torch.linalg.solve(covariance + shift, a.T @ (targets[train] - share))
            scores[number, fold == f] = (z[fold == f] - mean) @ weights + share
    likely = {
        (number, scale): float((scale * s).log_softmax(1).gather(1, labels.unsqueeze(1)).mean())
        for number, s in enumerate(scores)
        for scale in SCALES
    }
    number, scale = max(likely, key=likely.__getitem__)
    return (scale * scores[number]).softmax(1).float()


def test_the_probe_is_ridge_regression_out_of_fold():
    x, labels = clusters()
    p = ridge_probabilities(Standardised(x), labels, 4)
    torch.testing.assert_close(p, direct_ridge(x, labels, 4), atol=1e-4, rtol=0)
    assert (p.argmax(1) == labels).float().mean() > 0.9


def test_blocks_do_not_change_the_result(monkeypatch):
    x, labels = clusters()
    whole = pool_features(x, labels, 4)
    monkeypatch.setattr(probe, "BLOCK", 40)
    torch.testing.assert_close(pool_features(x, labels, 4), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 0.02)])
def test_features_of_other_types_give_the_same(dtype, tolerance):
    x, labels = clusters()
    torch.testing.assert_close(
        pool_features(x.to(dtype), labels, 4), pool_features(x, labels, 4), atol=tolerance, rtol=0
    )


def test_a_constant_feature_with_a_large_mean_changes_nothing():
    x, _ = clusters()
    constant = torch.cat([x, torch.full((len(x), 1), 1000.1)], 1)
    torch.testing.assert_close(Standardised(constant).matrix(True)[:, :-1], Standardised(x).matrix(True))
    assert not Standardised(constant).matrix(True)[:, -1].any()


def test_neighbours_of_wide_features_are_those_of_their_principal_components(monkeypatch):
    monkeypatch.setattr(probe, "WIDE", 32)
    monkeypatch.setattr(probe, "COMPONENTS", 8)
    x, labels = clusters(width=8)
    wide = x @ torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    z = Standardised(wide)
    for standardise in (False, True):
        compact, matrix = z.compact(standardise), z.matrix(standardise)
        assert compact.shape == (400, 8)
        torch.testing.assert_close(compact @ compact.T, matrix @ matrix.T, atol=0.05, rtol=1e-4)
    assert (pool_features(wide, labels, 4).argmax(1) == labels).float().mean() > 0.95


def test_wide_features_are_projected(monkeypatch):
    monkeypatch.setattr(probe, "MAX_FEATURES", 32)
    x, labels = clusters(width=200)
    z = Standardised(x)
    assert z.matrix(False).shape == (400, 32)
    assert (pool_features(x, labels, 4).argmax(1) == labels).float().mean() > 0.95


def test_many_classes_with_few_samples_each():
    x, labels = clusters(1000, 250, 32)
    p = pool_features(x, labels, 250)
    torch.testing.assert_close(p.sum(1), torch.ones(1000))
    assert (p.argmax(1) == labels).float().mean() > 0.5  # chance is 0.004


def test_the_pool_prefers_the_source_that_predicts_the_labels():
    labels = torch.arange(300) % 3
    good = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
    poor = torch.full((300, 3), 1 / 3)
    torch.testing.assert_close(pool([good, poor], labels), good.float(), atol=0.01, rtol=0)


def test_a_pool_that_gains_nothing_is_its_best_source():
    """A flatter copy adds nothing; two sources that each know half of the samples do."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (800,), generator=generator)
    sure = (4 * F.one_hot(labels, 4) + torch.randn(800, 4, generator=generator)).softmax(1)
    flat = 0.9 * sure + 0.1 / 4
    assert torch.equal(pool([flat, sure], labels), sure / sure.sum(1, keepdim=True))
    half = (torch.arange(800) % 2 == 0).unsqueeze(1)
    first, second = (torch.where(part, sure, 0.25) for part in (half, ~half))
    together = pool([first, second], labels)
    torch.testing.assert_close(together, (first + second) / 2, atol=0.02, rtol=0)


def test_a_labels_own_value_is_no_part_of_its_probabilities():
    x, labels = clusters()
    changed = labels.clone()
    changed[7] = (labels[7] + 1) % 4
    fold = torch.randperm(400, generator=seeds.generator(0, "folds")) % FOLDS
    probes = [probe._fit_probes(Standardised(x), y, fold, 4)[int(fold[7])] for y in (labels, changed)]
    for before, after in zip(*probes, strict=True):
        torch.testing.assert_close(before, after)


def test_the_probe_of_many_classes_is_as_sure_as_it_is_right():
    x, labels = clusters(3000, classes=100, width=40)
    p = ridge_probabilities(Standardised(x), labels, 100)
    right = float((p.argmax(1) == labels).float().mean())
    assert right > 0.9
    assert abs(float(p.amax(1).mean()) - right) < 0.15
