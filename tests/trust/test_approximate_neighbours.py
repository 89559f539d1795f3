"""Neighbours by faiss, against the exact search."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from tadperf.errors import UserError
from tadperf.trust import approximate_neighbours as module
from tadperf.trust import large_audit
from tadperf.trust.approximate_neighbours import approximate_neighbours
from tadperf.trust.neighbours import nearest_neighbours
from tadperf.trust.probe import Standardised

needs_faiss = pytest.mark.skipif(not module.is_available(), reason="faiss is not installed (extra large)")


def clusters(count: int, width: int = 32, classes: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    return centres[torch.arange(count) % classes] + 0.5 * torch.randn(count, width, generator=generator)


@needs_faiss
def test_neighbours_have_the_stated_recall(caplog: pytest.LogCaptureFixture):
    z = Standardised(clusters(3000))
    with caplog.at_level(logging.INFO):
        found = approximate_neighbours(z, 10)
    similarity, index = nearest_neighbours(z.matrix(True), 10)
    assert not (found.indices == torch.arange(3000).unsqueeze(1)).any()
    recall = (found.indices.unsqueeze(2) == index.unsqueeze(1)).any(2).float().mean()
    assert found.recall >= module.RECALL
    assert abs(float(recall) - found.recall) < 0.03
    assert f"recall {found.recall:.3f}" in caplog.text
    true = (
        F.normalize(z.matrix(True), dim=1)[found.indices.long()] * F.normalize(z.matrix(True), dim=1).unsqueeze(1)
    ).sum(2)
    torch.testing.assert_close(found.similarity, true, atol=2e-3, rtol=0)  # float16
    assert float(found.similarity.min()) > float(similarity.min()) - 0.2


@needs_faiss
def test_many_equal_samples_do_no_harm():
    features = clusters(1500)
    features[:700] = features[0]
    found = approximate_neighbours(Standardised(features), 10)
    assert not (found.indices == torch.arange(1500).unsqueeze(1)).any()
    assert (found.similarity[:700] > 0.999).all()


@needs_faiss
def test_two_searches_are_equal():
    z = Standardised(clusters(1200))
    first, second = (approximate_neighbours(z, 5) for _ in range(2))
    assert torch.equal(first.indices, second.indices)


@needs_faiss
def test_a_large_audit_uses_them(monkeypatch: pytest.MonkeyPatch):
    features, labels = clusters(2000, classes=4), torch.arange(2000) % 4
    labels[::10] = (labels[::10] + 1) % 4
    monkeypatch.setattr(large_audit, "APPROXIMATE", 0)
    stages: set[str] = set()
    found = large_audit.suspicion_of_labels(features, labels, 4, progress=lambda stage, *_, **__: stages.add(stage))
    assert "trust:graph" in stages
    assert found.odds[::10].min() > found.odds[1::10].max()


def test_a_clear_message_without_faiss(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"install tadperf\[large\]"):
        approximate_neighbours(Standardised(clusters(100)), 3)
