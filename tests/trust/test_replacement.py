"""The channel of replaced labels: its parameters, and what it says about a model's doubt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tadperf.trust.replacement import fit_replacement, replacement_odds

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 6000


def doubtful(classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns log probabilities [N, C] of a model that doubts, and labels drawn from these probabilities."""
    generator = torch.Generator().manual_seed(seed)
    log_p = (3 * torch.randn(COUNT, classes, generator=generator)).log_softmax(1)
    return log_p, torch.multinomial(log_p.exp(), 1, generator=generator).squeeze(1)


def replace(labels: Tensor, draws: list[float], seed: int = 1) -> Tensor:
    """Replaces the label of each sample by j with probability draws[j]."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.tensor([*draws, 1 - sum(draws)]).expand(len(labels), -1)
    drawn = torch.multinomial(chances, 1, generator=generator).squeeze(1)
    return torch.where(drawn < len(draws), drawn, labels)


@pytest.mark.parametrize("draws", [[0.02, 0.02, 0.02, 0.02], [0.0, 0.12, 0.0, 0.0]])
def test_the_draws_are_those_of_the_noise(draws: list[float]):
    log_p, labels = doubtful()
    fitted = fit_replacement(log_p, replace(labels, draws))
    assert fitted.draws.tolist() == pytest.approx(draws, abs=0.015)
    assert fitted.power == pytest.approx(1, abs=0.15)
    assert fitted.explained > 0.15


def test_a_scale_of_the_logits_changes_the_power_alone():
    log_p, labels = doubtful()
    given = replace(labels, [0.03] * 4)
    fitted, scaled = fit_replacement(log_p, given), fit_replacement((2 * log_p).log_softmax(1), given)
    assert scaled.power == pytest.approx(fitted.power / 2, rel=0.02)
    assert scaled.explained == pytest.approx(fitted.explained, abs=0.02)


def test_labels_drawn_from_the_model_are_explained_without_replacements():
    log_p, labels = doubtful()
    fitted = fit_replacement(log_p, labels)
    assert float(fitted.draws.sum()) < 0.01
    assert fitted.explained < 0.08


def test_the_odds_are_those_of_the_formula():
    log_p, labels = doubtful()
    fitted = fit_replacement(log_p, replace(labels, [0.05] * 4))
    q = (fitted.power * log_p.double()).softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    drawn = fitted.draws[labels]
    wrong = drawn * (1 - q) / (q * (1 - fitted.draws.sum()) + drawn)
    odds = replacement_odds(fitted, log_p, labels)
    torch.testing.assert_close(odds.double().sigmoid(), wrong, atol=1e-5, rtol=1e-4)
    assert odds.dtype == torch.float32


def test_certain_probabilities_and_an_impossible_label_are_finite():
    log_p = torch.full((60, 3), -80.0)
    log_p[:, 0] = 0
    labels = torch.zeros(60, dtype=torch.int64)
    labels[7] = 2
    fitted = fit_replacement(log_p, labels)
    odds = replacement_odds(fitted, log_p, labels)
    assert odds.isfinite().all()
    assert int(odds.argmax()) == 7
    assert 0 <= fitted.explained <= 1
