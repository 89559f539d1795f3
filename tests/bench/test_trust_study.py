"""The study of the dual loop's parts."""

from __future__ import annotations

import torch
from torch import nn

from tadperf.bench.studies import trust
from tadperf.config.merge import merge
from tadperf.data.open import open_data
from tadperf.trust.state import as_given


def test_its_students_learn_the_trusted_samples_with_their_weights(monkeypatch):
    train, test = open_data("digits")
    assert test is not None
    state = as_given(train.labels, train.class_names, train.labels.roll(1))
    weights = torch.linspace(0, 1, len(train))
    state = trust.TrustState(**{**vars(state), "reliability": weights})
    seen = []

    def keep(examples, *_) -> nn.Module:
        seen.append(examples)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    monkeypatch.setattr(trust, "train_student", keep)
    trust.student_accuracy(state, train, test, merge("digits"))
    assert len(seen[0].images) == int(state.trusted.sum()) < len(train)
    assert torch.equal(seen[0].weights, weights[state.trusted])
    assert torch.equal(seen[0].labels, train.labels[state.trusted])
