"""The noise channel: how many labels it returns for a weak model, for noise by class and for human errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tadperf.trust.channel import channel_odds, fit_channel, most_suspicious, noise_channel

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, CLASSES = 4000, 6


def overlapping(scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns probabilities [N, C] of a calibrated model and true classes drawn from them. scale: of the logits."""
    generator = torch.Generator().manual_seed(seed)
    p = (scale * torch.randn(COUNT, CLASSES, generator=generator)).softmax(1)
    return p, torch.multinomial(p, 1, generator=generator).squeeze(1)


def uniform(true: Tensor, rate: float, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    other = (true + torch.randint(1, CLASSES, true.shape, generator=generator)) % CLASSES
    return torch.where(torch.rand(true.shape, generator=generator) < rate, other, true)


def f1(found: Tensor, wrong: Tensor) -> float:
    return 2 * int(wrong[found].sum()) / (len(found) + int(wrong.sum()))


def test_the_doubts_of_a_weak_model_are_no_errors():
    """8 % of the samples have a class that is not the likeliest, and 3 % a wrong label."""
    p, true = overlapping(8.0)
    given = uniform(true, 0.03)
    differs = (p.argmax(1) != given).nonzero().squeeze(1)
    found = most_suspicious(noise_channel(p, given).odds)
    assert f1(differs, given != true) < 0.5
    assert f1(found, given != true) > 0.7
    assert 0.6 < len(found) / int((given != true).sum()) < 1.5


def test_human_errors_are_those_that_the_model_predicts():
    """The model knows how likely the second class is given instead of the true one: nothing is by class."""
    generator = torch.Generator().manual_seed(3)
    true = torch.randint(0, CLASSES, (COUNT,), generator=generator)
    second = (true + torch.randint(1, CLASSES, true.shape, generator=generator)) % CLASSES
    chance = 0.4 * torch.rand(COUNT, generator=generator) ** 2
    given = torch.where(torch.rand(COUNT, generator=generator) < chance, second, true)
    p = torch.zeros(COUNT, CLASSES)
    p.scatter_(1, second.unsqueeze(1), chance.unsqueeze(1)).scatter_(1, true.unsqueeze(1), 1 - chance.unsqueeze(1))
    fitted = fit_channel(p, given)
    assert fitted.by_class == 0 == fitted.replaced_weight
    found = most_suspicious(channel_odds(fitted, p, given))
    assert f1(found, given != true) > 0.95


def test_a_class_that_is_renamed_is_found():
    """45 % of each class have the label of the next one; the model predicts both labels."""
    generator = torch.Generator().manual_seed(4)
    true = torch.randint(0, CLASSES, (COUNT,), generator=generator)
    given = torch.where(torch.rand(COUNT, generator=generator) < 0.45, (true + 1) % CLASSES, true)
    eye = torch.eye(CLASSES)
    p = 0.55 * eye[true] + 0.45 * eye[(true + 1) % CLASSES]
    p = (p.clamp(min=1e-3).log() + 0.2 * torch.randn(COUNT, CLASSES, generator=generator)).softmax(1)
    found = noise_channel(p, given)
    assert f1(most_suspicious(found.odds), given != true) > 0.97
    assert float(found.transition.diagonal().mean()) == pytest.approx(0.55, abs=0.05)


def test_the_odds_of_a_part_are_those_of_the_whole():
    p, true = overlapping(8.0)
    given = uniform(true, 0.03)
    fitted = fit_channel(p, given)
    assert fitted.replaced_weight > 0
    rows = torch.arange(0, COUNT, 7)
    torch.testing.assert_close(channel_odds(fitted, p[rows], given[rows]), channel_odds(fitted, p, given)[rows])


def test_a_fit_on_a_part_returns_about_as_many_labels(monkeypatch: pytest.MonkeyPatch):
    p, true = overlapping(8.0)
    given = uniform(true, 0.03)
    whole = len(most_suspicious(noise_channel(p, given).odds))
    monkeypatch.setattr("tadperf.trust.channel.SELECTION_SIZE", 2000 * CLASSES)
    part = len(most_suspicious(noise_channel(p, given).odds))
    assert whole * 0.6 < part < whole * 1.6
