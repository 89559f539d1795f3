"""Neighbour estimates, against dense algebra and on points with known classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.compute.work_progress import counting, work
from tadperf.trust import neighbours
from tadperf.trust.neighbours import (
    affinity,
    estimate_from_neighbours,
    estimate_transition,
    nearest_neighbours,
    spread_labels,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def points(classes: int, each: int, spread: float = 0.6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns Gaussian clouds around random centres in 16 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.arange(classes).repeat(each)
    centres = torch.randn(classes, 16, generator=generator)
    return centres[clean] + spread * torch.randn(len(clean), 16, generator=generator), clean


def noisy(clean: Tensor, rate: float, kind: str, seed: int = 1) -> Tensor:
    generator, classes = torch.Generator().manual_seed(seed), int(clean.max()) + 1
    flip = torch.rand(len(clean), generator=generator) < rate
    step = 1 if kind == "pair" else torch.randint(1, classes, clean.shape, generator=generator)
    return torch.where(flip, (clean + step) % classes, clean)


def test_neighbours_are_exact_in_any_block_size(monkeypatch):
    z = torch.randn(101, 7, generator=torch.Generator().manual_seed(0))
    similarity = F.cosine_similarity(z[:, None], z[None], dim=2) - 3 * torch.eye(101)
    values, index = similarity.topk(5, 1)
    for block in (1, 1000, 2**24):
        monkeypatch.setattr(neighbours, "CPU_BLOCK", block)
        similarities, neighbour = nearest_neighbours(z, 5)
        torch.testing.assert_close(similarities, values, rtol=0, atol=1e-6)
        assert torch.equal(neighbour, index)


def test_affinity_and_spread_equal_dense_algebra():
    z, labels = points(3, 20)
    similarity, index = nearest_neighbours(z, neighbours.NEIGHBOURS)
    w = torch.zeros(60, 60).scatter_(1, index, similarity.clamp(min=0) ** 3)
    w = w + w.T
    dense = w / (w.sum(1)[:, None] * w.sum(0)[None]).sqrt()
    s = affinity(z)
    torch.testing.assert_close(s.to_dense(), dense)
    y = F.one_hot(labels, 3).float()
    for reach, total in zip((0.5, 0.8), spread_labels(s, y, (0.5, 0.8)), strict=True):
        torch.testing.assert_close(total, torch.linalg.solve(torch.eye(60) - reach * dense, y), rtol=1e-2, atol=2e-3)


def test_a_sample_does_not_see_its_own_label(monkeypatch):
    """A changed label changes what other samples see, but not what the sample itself sees; with folds and two steps."""
    z, clean = points(3, 30)
    s, other = affinity(z), clean.clone()
    other[4] = (clean[4] + 1) % 3
    for limit in (2**25, 0):
        monkeypatch.setattr(neighbours, "FOLD_SIZE", limit)
        pairs = zip(
            neighbours.neighbour_labels(s, clean, 3, 0), neighbours.neighbour_labels(s, other, 3, 0), strict=True
        )
        for (_, before), (_, after) in pairs:
            torch.testing.assert_close(before[4], after[4], rtol=1e-4, atol=1e-5)
            assert (before - after).abs().max() > 1e-2


@pytest.mark.parametrize(("rate", "kind", "least"), [(0.4, "pair", 0.97), (0.5, "symmetric", 0.97), (0, "pair", 0.99)])
def test_true_classes_are_found_despite_noise(rate, kind, least):
    z, clean = points(5, 120)
    labels = noisy(clean, rate, kind)
    estimate = estimate_from_neighbours(z, labels, 5, 0)
    assert float((estimate.posterior.argmax(1) == clean).float().mean()) >= least
    torch.testing.assert_close(estimate.posterior.sum(1), torch.ones(600))
    if kind == "pair":
        assert float((estimate.transition.diagonal() - (1 - rate)).abs().max()) < 0.12


def test_the_transition_matrix_beats_the_vote_for_pair_flips():
    """The clouds touch and 40 % are flipped, so the most frequent label of a neighbourhood is often wrong."""
    z, clean = points(5, 120, 0.8)
    labels = noisy(clean, 0.4, "pair")
    right = [
        float((estimate_from_neighbours(z, labels, 5, 0, transition=t).posterior.argmax(1) == clean).float().mean())
        for t in (True, False)
    ]
    assert right[0] > right[1] + 0.1


def test_with_more_than_half_flipped_the_flipped_class_is_found():
    """Above 50 % the wrong label is the most likely one. No method can detect that; the result stays finite."""
    z, clean = points(4, 100)
    estimate = estimate_from_neighbours(z, noisy(clean, 0.6, "pair"), 4, 0)
    assert estimate.posterior.isfinite().all()
    assert float((estimate.posterior.argmax(1) == (clean + 1) % 4).float().mean()) > 0.9


def test_two_steps_are_enough_for_many_classes(monkeypatch):
    z, clean = points(20, 20, 0.3)
    labels = noisy(clean, 0.3, "symmetric")
    monkeypatch.setattr(neighbours, "FOLD_SIZE", 0)
    monkeypatch.setattr(neighbours, "SELECTION_SIZE", 20 * 100)
    estimate = estimate_from_neighbours(z, labels, 20, 0)
    assert float((estimate.posterior.argmax(1) == clean).float().mean()) > 0.95


@pytest.mark.parametrize("count", [2, 3, 7])
def test_few_samples(count):
    z = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    estimate = estimate_from_neighbours(z, torch.arange(count) % 2, 2, 0)
    assert estimate.posterior.isfinite().all()
    assert estimate.posterior.shape == (count, 2)


def test_transition_by_counting_with_a_prior_and_a_largest_diagonal():
    clean = torch.arange(3).repeat(400)
    labels = noisy(clean, 0.3, "pair")
    t = estimate_transition(F.one_hot(clean, 3).float(), labels, 0.0)
    counts = torch.zeros(3, 3).index_put_((clean, labels), torch.ones(1200), accumulate=True) / 400
    torch.testing.assert_close(t, 0.99 * counts + 0.01 / 3)
    even = estimate_transition(F.one_hot(clean, 3).float(), labels, 1e9)
    off = even[~torch.eye(3, dtype=torch.bool)]
    torch.testing.assert_close(off, off.mean().expand(6))
    flipped = estimate_transition(F.one_hot(clean, 3).float(), noisy(clean, 0.7, "pair"), 0.0)
    assert (flipped.diagonal() >= flipped.amax(1)).all()


@pytest.mark.parametrize(("fold_size", "total"), [(2**25, 156), (0, 8)])
def test_progress_counts_every_step_on_large_sets(monkeypatch, fold_size, total):
    calls: list[tuple[int, int]] = []

    def record(stage: str, done: int, total: int, **values: object) -> None:
        assert stage == "trust:neighbours"
        calls.append((done, total))

    z, clean = points(3, 20)
    monkeypatch.setattr(neighbours, "FOLD_SIZE", fold_size)
    estimate_from_neighbours(z, clean, 3, 0, progress=record)
    assert calls == []
    monkeypatch.setattr(neighbours, "REPORTED_SIZE", 60 * 3)
    estimate_from_neighbours(z, clean, 3, 0, progress=record)
    assert calls == [(done, total) for done in range(total + 1)]


def test_the_progress_of_the_comparison_counts_every_sample(monkeypatch):
    monkeypatch.setattr(neighbours, "CPU_BLOCK", 20 * 8)
    z, units = torch.randn(20, 4), []
    with counting(units.append):
        nearest_neighbours(z, 3)
    assert units == [work(8), work(8), work(4)]
