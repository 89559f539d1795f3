"""New labels of an audit: against the exact posterior of a simulation, and by their share of errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tadperf.trust import audit_labels, top_classes
from tadperf.trust.correction import fit_pool, likeliest_class, sure_classes
from tadperf.trust.state import RELABELLED, UNTRUSTED

from .simulated import simulated_labels

pytestmark = pytest.mark.usefixtures("one_thread")


def exact_posterior(blind: np.ndarray, transition: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Bayes' rule in float64: P(class | features, label)."""
    joint = blind.astype(np.float64) * transition[:, labels].T
    return joint / joint.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 4, 9])
def test_the_class_and_its_probability_are_those_of_bayes_rule(classes):
    """The simulated model is exact, so the estimated weight is close to 1, and the transition to the true one."""
    labels, p, _, clean = simulated_labels(6000, classes)
    transition = np.full((classes, classes), 0.2 / (classes - 1))
    np.fill_diagonal(transition, 0.8)
    exact = exact_posterior(p, transition, labels)
    given, probabilities = torch.from_numpy(labels), torch.from_numpy(p)
    found = likeliest_class(fit_pool(probabilities, given), probabilities, given)
    assert (found.candidate.numpy() == exact.argmax(1)).mean() > 0.995
    assert np.abs(found.probability.numpy() - exact.max(1)).mean() < 0.01
    sure = sure_classes(found, classes, 0.05).numpy()
    assert (found.candidate.numpy() == clean)[sure].mean() > 0.94
    assert sure.mean() > 0.9


@pytest.mark.parametrize("large", [False, True])
def test_an_audit_relabels_what_is_sure(large, monkeypatch):
    if large:
        monkeypatch.setattr(top_classes, "LARGE", 0)
    labels, p, _, clean = simulated_labels(2000, seed=1)
    p = 0.9 * p + 0.1 * np.random.default_rng(3).dirichlet(np.full(4, 0.3), 2000)  # not all are sure
    state = audit_labels(labels, p)
    relabelled = (state.verdict == RELABELLED).numpy()
    wrong = labels != clean
    assert relabelled.sum() > 0.7 * wrong.sum()
    assert (state.working.numpy() == clean)[relabelled].mean() > 0.9
    assert (state.working == state.suggested)[torch.from_numpy(relabelled)].all()
    assert torch.equal(state.working[~torch.from_numpy(relabelled)], state.given[~torch.from_numpy(relabelled)])
    assert (state.reliability[torch.from_numpy(relabelled)] > 0.5).all()


def test_probabilities_that_say_little_relabel_nothing_wrongly():
    labels, _, _, _ = simulated_labels()
    state = audit_labels(labels, np.full((600, 4), 0.25))
    assert not (state.verdict == RELABELLED).any()


def test_a_set_of_right_labels_keeps_them():
    clean = np.arange(300) % 3
    p = np.full((300, 3), 0.01) + 0.97 * np.eye(3)[clean]
    state = audit_labels(clean, p)
    assert state.trusted.all()
    assert torch.equal(state.working, state.given)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(2, 60), st.integers(0, 99))
def test_any_probabilities_give_a_valid_state(classes, count, seed):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(classes, 0.2), count).astype(np.float32)
    p = np.where(rng.random((count, 1)) < 0.2, np.eye(classes, dtype=np.float32)[p.argmax(1)], p)  # exact zeros
    state = audit_labels(rng.integers(0, classes, count), p)
    untrusted = state.verdict == UNTRUSTED
    assert torch.equal(state.issues, untrusted | (state.verdict == RELABELLED))
    assert ((state.working != state.given) == (state.verdict == RELABELLED)).all()


def test_a_larger_budget_relabels_more_and_keeps_it():
    """The expected share of errors is that of an exact model, so the errors of the view stay within the budget."""
    labels, p, _, clean = simulated_labels(8000, 3)
    p = 0.7 * p + 0.3 * np.random.default_rng(1).dirichlet(np.ones(3), len(p))
    counts = []
    for budget in (0.01, 0.05, 0.2):
        given, probabilities = torch.from_numpy(labels), torch.from_numpy(p)
        sure = sure_classes(found := likeliest_class(fit_pool(probabilities, given), probabilities, given), 3, budget)
        assert (found.candidate.numpy() != clean)[sure].mean() < budget + 0.03
        state = audit_labels(labels, p, budget=budget)
        counts.append(int((state.verdict == RELABELLED).sum()))
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
