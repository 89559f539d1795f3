"""The audit in blocks: its parts equal those of the audit that holds all probabilities, and so do its verdicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import average_precision_score

from tadperf.trust import approximate_neighbours, large_audit, neighbours, probe, top_classes
from tadperf.trust.channel import noise_channel
from tadperf.trust.evidence import audit_labels
from tadperf.trust.large_audit import neighbour_votes, suspicion_of_labels, two_steps
from tadperf.trust.neighbours import affinity
from tadperf.trust.probe import Standardised, pool_features

from ..compute.test_ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, CLASSES, WIDTH = 2000, 12, 24
needs_faiss = pytest.mark.skipif(
    not approximate_neighbours.is_available(), reason="faiss is not installed (extra large)"
)


def data(seed: int = 0, count: int = COUNT) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns features in overlapping classes, true labels, and labels of which 20 % are wrong."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(0, CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    features = 0.7 * centres[true] + torch.randn(count, WIDTH, generator=generator)
    wrong = torch.rand(count, generator=generator) < 0.2
    other = (true + torch.randint(1, CLASSES, (count,), generator=generator)) % CLASSES
    return features, true, torch.where(wrong, other, true)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_audit, "BLOCK", 300 * CLASSES)
    monkeypatch.setattr(probe, "BLOCK", 170 * WIDTH)


def test_votes_in_blocks_are_the_products_with_the_graph(monkeypatch: pytest.MonkeyPatch, small_blocks: None):
    features, _, given = data()
    graph = affinity(features)
    monkeypatch.setattr(neighbours, "FOLD_SIZE", 0)
    [(_, expected)] = neighbours.neighbour_labels(graph, given, CLASSES, 0)
    votes = neighbour_votes(graph, given, CLASSES)
    rows = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))[:77]
    found = two_steps(graph, votes, given, rows, CLASSES)
    torch.testing.assert_close(found, expected[rows].clamp(min=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_model", [False, True])
def test_the_suspicion_is_that_of_the_whole_matrix(with_model: bool, small_blocks: None):
    """All samples fit the channel here, so only the sources differ: one graph and reach instead of all."""
    features, true, given = data()
    model = torch.rand(COUNT, CLASSES, generator=torch.Generator().manual_seed(2)) if with_model else None
    model = None if model is None else (model + 3 * torch.eye(CLASSES)[true]).softmax(1)
    found = suspicion_of_labels(features, given, CLASSES, model)
    exact = noise_channel(pool_features(features, given, CLASSES, model), given).odds
    wrong = given != true
    ours, theirs = (average_precision_score(wrong, odds) for odds in (found.odds, exact))
    assert ours > 0.75
    assert ours > theirs - 0.02
    assert (found.other != given).all()
    assert (found.other[wrong] == true[wrong]).float().mean() > 0.5


def test_probabilities_alone_are_enough(small_blocks: None):
    _, true, given = data()
    p = (2 * torch.eye(CLASSES)[true] + torch.rand(COUNT, CLASSES, generator=torch.Generator().manual_seed(3))).softmax(
        1
    )
    found = suspicion_of_labels(None, given, CLASSES, p)
    torch.testing.assert_close(found.odds, noise_channel(p, given).odds, atol=1e-4, rtol=1e-4)


def test_part_of_the_samples_fits_the_channel(monkeypatch: pytest.MonkeyPatch, small_blocks: None):
    features, true, given = data()
    whole = suspicion_of_labels(features, given, CLASSES).odds
    monkeypatch.setattr(large_audit, "FITTED", 1000 * CLASSES)
    monkeypatch.setattr(large_audit, "WEIGHTED", 500)
    part = suspicion_of_labels(features, given, CLASSES).odds
    scores = [average_precision_score(given != true, odds) for odds in (whole, part)]
    assert scores[1] > scores[0] - 0.01


def test_a_large_audit_gives_the_verdicts_of_a_small_one(monkeypatch: pytest.MonkeyPatch):
    features, true, given = data()
    small = audit_labels(given, features=features)
    monkeypatch.setattr(top_classes, "LARGE", 0)
    large = audit_labels(given, features=features)
    assert (small.issues == large.issues).float().mean() > 0.95
    assert (small.verdict == large.verdict).float().mean() > 0.9
    assert large.class_names == small.class_names
    assert (large.suggested[~large.issues] == given[~large.issues]).all()
    hits = (large.issues & (given != true)).sum() / (given != true).sum()
    assert hits > 0.6


def test_samples_without_neighbours_and_constant_features_are_finite(small_blocks: None):
    features, _, given = data(count=600)
    features[:300] = 0
    found = suspicion_of_labels(features, given, CLASSES)
    assert found.odds.isfinite().all()


def test_progress_ends_every_stage():
    features, _, given = data(count=400)
    last: dict[str, tuple[int, int]] = {}
    suspicion_of_labels(
        features, given, CLASSES, progress=lambda stage, done, total, **_: last.update({stage: (done, total)})
    )
    assert set(last) == {"features", "trust:graph", "trust:labels"}
    assert all(done == total for done, total in last.values())


@pytest.mark.timeout(120)
@pytest.mark.parametrize("approximate", [False, pytest.param(True, marks=needs_faiss)])
def test_ranks_share_the_search_for_neighbours(
    approximate: bool, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    features, _, given = data(count=1000)
    monkeypatch.setattr(neighbours, "CPU_BLOCK", 150 * len(features))
    monkeypatch.setattr(approximate_neighbours, "BLOCK", 150)
    monkeypatch.setattr(large_audit, "APPROXIMATE", 0 if approximate else 2**17)
    module, name = (approximate_neighbours, "_search") if approximate else (large_audit, "nearest_in_block")
    search, calls = getattr(module, name), [0]

    def counted(*arguments: Any) -> Any:
        if not approximate or len(arguments[2]) <= 150:  # not the larger block that measures the recall
            calls[0] += 1
        return search(*arguments)

    monkeypatch.setattr(module, name, counted)

    def work() -> Any:
        calls[0] = 0
        if approximate:
            import faiss

            faiss.omp_set_num_threads(1)  # a forked process has no thread pool
        found = suspicion_of_labels(features, given, CLASSES)
        return found.odds.numpy(), found.other.numpy(), calls[0]

    alone, both = work(), run_ranks(2, work)
    for odds, other, _ in both:
        assert (odds == alone[0]).all()
        assert (other == alone[1]).all()
    assert [blocks for _, _, blocks in (alone, *both)] == [7, 4, 3]


def test_standardised_rows_are_read_by_index():
    features, _, _ = data(count=50)
    z = Standardised(features)
    rows = torch.tensor([3, 1, 40])
    torch.testing.assert_close(z[rows], z.matrix(True)[rows])
