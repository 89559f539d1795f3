"""The outer division, on losses that anybody could bring."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tadperf.trust.partition import partition

pytestmark = pytest.mark.usefixtures("one_thread")


def losses(wrong: Tensor, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Small for right labels, around 3 nats for wrong ones."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(wrong), generator=generator) - 0.5
    return torch.where(wrong, 3 + 2 * noise, 0.25 + 0.4 * noise) * scale


def flipped(labels: Tensor, rates: list[float], seed: int = 1) -> Tensor:
    draws = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
    return draws < torch.tensor(rates)[labels]


def test_each_class_is_split_at_its_own_rate():
    labels = torch.arange(3).repeat(400)
    wrong = flipped(labels, [0.05, 0.4, 0.7])
    found = partition(losses(wrong), labels)
    assert found.separated.all()
    assert torch.equal(found.trusted, ~wrong)
    assert found.posterior.dtype == torch.float32
    assert ((found.posterior >= 0) & (found.posterior <= 1)).all()


def test_classes_of_different_scale_need_a_class_wise_split():
    """A hard class whose right labels lose as much as the wrong ones of an easy class."""
    labels = torch.arange(2).repeat(500)
    wrong = flipped(labels, [0.3, 0.3])
    values = torch.where(labels == 0, losses(wrong), losses(wrong) * 12)
    assert torch.equal(partition(values, labels).trusted, ~wrong)
    assert not torch.equal(partition(values, labels, class_wise=False).trusted, ~wrong)


def test_one_clean_class_and_one_hard_one_keep_their_labels():
    """Losses below log 2 are no wrong labels, however they are spread."""
    labels = torch.arange(3).repeat(300)
    wrong = flipped(labels, [0.0, 0.0, 0.4])
    values = losses(wrong)
    hard = labels == 1
    values[hard] = torch.where(torch.arange(int(hard.sum())) % 2 == 0, 0.05, 0.6) + 0.01 * values[hard]
    found = partition(values, labels)
    assert found.trusted[labels < 2].all()
    assert torch.equal(found.trusted, ~wrong)
    assert found.separated.tolist() == [False, False, True]


def test_a_class_of_five_takes_the_split_of_all():
    labels = torch.cat([torch.zeros(500), torch.ones(5)]).long()
    wrong = flipped(labels, [0.4, 0.0])
    wrong[-1] = True
    found = partition(losses(wrong), labels)
    assert torch.equal(found.trusted, ~wrong)


@pytest.mark.parametrize("value", [0.0, 0.1, 5.0])
def test_constant_losses_are_all_trusted(value):
    found = partition(torch.full((90,), value), torch.arange(3).repeat(30))
    assert found.trusted.all()
    assert not found.separated.any()


def test_losses_that_diverged_are_refused_by_number_and_place():
    values = torch.ones(50)
    values[[7, 9, 30]] = math.nan
    with pytest.raises(ValueError, match="losses: nan at sample 7, and 3 such in all: expected numbers"):
        partition(values, torch.zeros(50, dtype=torch.int64))


def test_an_infinite_loss_is_a_wrong_label_even_in_a_clean_class():
    values = losses(torch.zeros(100, dtype=torch.bool))
    values[3] = torch.inf
    found = partition(values, torch.zeros(100, dtype=torch.int64))
    assert not found.trusted[3]
    assert int(found.trusted.sum()) == 99


def test_the_threshold_keeps_the_expected_share_of_wrong_labels_in_budget():
    """Modes that overlap: a fixed threshold lets in more wrong labels than the budget."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.zeros(4000, dtype=torch.int64)
    wrong = flipped(labels, [0.4])
    values = torch.randn(4000, generator=generator) * 0.6 + torch.where(wrong, 2.4, 1.0)
    fixed = partition(values, labels, dynamic_threshold=False)
    strict, loose = (partition(values, labels, budget=b) for b in (0.02, 0.05))
    assert fixed.threshold.item() == 0.5
    assert strict.threshold > loose.threshold > 0.5
    for found, budget in ((strict, 0.02), (loose, 0.05)):
        assert float((1 - found.posterior[found.trusted]).mean()) <= budget
        assert float(wrong[found.trusted].float().mean()) < budget + 0.02
    assert float(wrong[fixed.trusted].float().mean()) > 0.08


def test_order_does_not_matter():
    labels = torch.arange(4).repeat(100)
    values = losses(flipped(labels, [0.1, 0.2, 0.3, 0.4]))
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    whole, shuffled = partition(values, labels), partition(values[order], labels[order])
    torch.testing.assert_close(shuffled.posterior, whole.posterior[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "labels", "more", "message"),
    [
        (torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), {}, r"losses: torch.int64 \(3,\)"),
        (torch.ones(0), torch.zeros(0, dtype=torch.int64), {}, r"losses: torch.float32 \(0,\): expected floats"),
        (torch.ones(3), torch.zeros(2, dtype=torch.int64), {}, r"labels: torch.int64 \(2,\): expected int32 or int64"),
        (torch.ones(3), torch.tensor([0, 5, 1]), {"num_classes": 3}, "labels: 5 at sample 1: expected 0 to 2"),
        (torch.ones(3), torch.tensor([0, 0, 1]), {"budget": 1.0}, r"budget: 1.0: expected a share in \[0, 1\)"),
    ],
)
def test_wrong_use(values, labels, more, message):
    with pytest.raises(ValueError, match=message):
        partition(values, labels, **more)
