"""The outer partition, on simulated losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tadperf.trust.partition import partition, sort_by_group

pytestmark = pytest.mark.usefixtures("one_thread")


def losses(wrong: Tensor, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Returns losses: small for right labels, around 3 nats for wrong ones."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(wrong), generator=generator) - 0.5
    return torch.where(wrong, 3 + 2 * noise, 0.25 + 0.4 * noise) * scale


def flipped(labels: Tensor, rates: list[float], seed: int = 1) -> Tensor:
    draws = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
    return draws < torch.tensor(rates)[labels]


def test_each_class_is_split_at_its_own_rate():
    labels = torch.arange(3).repeat(400)
    wrong = flipped(labels, [0.05, 0.4, 0.7])
    result = partition(losses(wrong), labels)
    assert result.separated.all()
    assert torch.equal(result.trusted, ~wrong)
    assert result.posterior.dtype == torch.float32
    assert ((result.posterior >= 0) & (result.posterior <= 1)).all()


def test_classes_of_different_difficulty_need_a_class_wise_split():
    """The right labels of a hard class have the same losses as the wrong labels of an easy class."""
    labels = torch.arange(2).repeat(500)
    wrong = flipped(labels, [0.3, 0.3])
    values = torch.where(labels == 0, losses(wrong), losses(wrong) * 12)
    assert torch.equal(partition(values, labels).trusted, ~wrong)
    assert not torch.equal(partition(values, labels, class_wise=False).trusted, ~wrong)


def test_a_clean_class_and_a_hard_class_keep_their_labels():
    """Losses below log 2 are never wrong labels, even in two modes."""
    labels = torch.arange(3).repeat(300)
    wrong = flipped(labels, [0.0, 0.0, 0.4])
    values = losses(wrong)
    hard = labels == 1
    values[hard] = torch.where(torch.arange(int(hard.sum())) % 2 == 0, 0.05, 0.6) + 0.01 * values[hard]
    result = partition(values, labels)
    assert result.trusted[labels < 2].all()
    assert torch.equal(result.trusted, ~wrong)
    assert result.separated.tolist() == [False, False, True]


def test_a_class_of_five_uses_the_split_of_all_classes():
    labels = torch.cat([torch.zeros(500), torch.ones(5)]).long()
    wrong = flipped(labels, [0.4, 0.0])
    wrong[-1] = True
    result = partition(losses(wrong), labels)
    assert torch.equal(result.trusted, ~wrong)


@pytest.mark.parametrize("value", [0.0, 0.1, 5.0])
def test_constant_losses_are_all_trusted(value):
    result = partition(torch.full((90,), value), torch.arange(3).repeat(30))
    assert result.trusted.all()
    assert not result.separated.any()


def test_nan_losses_are_refused():
    values = torch.ones(50)
    values[[7, 9, 30]] = math.nan
    with pytest.raises(ValueError, match=r"losses: nan at sample 7 \(3 of 50 are NaN or -inf\): the model"):
        partition(values, torch.zeros(50, dtype=torch.int64))


def test_an_infinite_loss_is_a_wrong_label_even_in_a_clean_class():
    values = losses(torch.zeros(100, dtype=torch.bool))
    values[3] = torch.inf
    result = partition(values, torch.zeros(100, dtype=torch.int64))
    assert not result.trusted[3]
    assert int(result.trusted.sum()) == 99


def test_the_threshold_keeps_wrong_labels_within_the_budget():
    """With modes that overlap, a fixed threshold admits more wrong labels than the budget."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.zeros(4000, dtype=torch.int64)
    wrong = flipped(labels, [0.4])
    values = torch.randn(4000, generator=generator) * 0.6 + torch.where(wrong, 2.4, 1.0)
    fixed = partition(values, labels, dynamic_threshold=False)
    strict, loose = (partition(values, labels, budget=b) for b in (0.02, 0.05))
    assert fixed.threshold.item() == 0.5
    assert strict.threshold > loose.threshold > 0.5
    for result, budget in ((strict, 0.02), (loose, 0.05)):
        assert float((1 - result.posterior[result.trusted]).mean()) <= budget
        assert float(wrong[result.trusted].float().mean()) < budget + 0.02
    assert float(wrong[fixed.trusted].float().mean()) > 0.08


def test_the_order_of_samples_does_not_matter():
    labels = torch.arange(4).repeat(100)
    values = losses(flipped(labels, [0.1, 0.2, 0.3, 0.4]))
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    ordered, shuffled = partition(values, labels), partition(values[order], labels[order])
    torch.testing.assert_close(shuffled.posterior, ordered.posterior[order], rtol=0, atol=1e-5)


def test_sorting_by_group_is_exact_and_handles_ties():
    """Compares with a sort by two keys; with many ties, empty groups, and the extremes 0, 0.5 and 1."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 1000, (5000,), generator=generator) * 3
    posterior = torch.rand(5000, generator=generator).clamp(min=0.5)
    posterior[:2000] = (posterior[:2000] * 4).round() / 4  # 0.5, 0.75 or 1: many ties
    posterior[2000:2010] = 0.0
    expected = sorted(zip(groups.tolist(), posterior.tolist(), strict=True), key=lambda pair: (pair[0], -pair[1]))
    group, p = sort_by_group(groups, posterior)
    assert list(zip(group.tolist(), p.tolist(), strict=True)) == expected


def test_equal_posteriors_get_one_verdict():
    """50 equal losses in each mode: the threshold never separates equal posteriors."""
    values = torch.tensor([0.1, 3.0]).repeat_interleave(50) + torch.tensor([0.0, 1e-3]).repeat(50)
    result = partition(values, torch.zeros(100, dtype=torch.int64))
    assert result.trusted.tolist() == [True] * 50 + [False] * 50


def test_numpy_arrays_and_lists_give_the_same_result():
    labels = torch.arange(3).repeat(100)
    values = losses(flipped(labels, [0.1, 0.3, 0.5]))
    expected = partition(values, labels)
    reversed_arrays = values.numpy()[::-1], labels.numpy()[::-1].astype("int16")
    assert torch.equal(partition(*reversed_arrays).trusted.flip(0), expected.trusted)
    assert torch.equal(partition(values.numpy(), labels.tolist()).threshold, expected.threshold)
    assert torch.equal(partition(values.requires_grad_(), labels).posterior, expected.posterior)


@pytest.mark.parametrize(
    ("values", "labels", "more", "message"),
    [
        (
            torch.ones(3, dtype=torch.int64),
            torch.zeros(3, dtype=torch.int64),
            {},
            r"losses: int64 \[3\]: must be floats",
        ),
        (torch.ones(0), torch.zeros(0, dtype=torch.int64), {}, r"losses: float32 \[0\]: must be floats"),
        (torch.ones(3), torch.zeros(2, dtype=torch.int64), {}, r"labels: int64 \[2\]: must be integers \[3\]"),
        (torch.ones(3), torch.tensor([0, 5, 1]), {"num_classes": 3}, r"labels: 5 at sample 1: must be in 0\.\.2"),
        (torch.ones(3), torch.tensor([0, 0, 1]), {"budget": 1.0}, r"budget: 1.0: must be a share in \[0, 1\)"),
    ],
)
def test_wrong_use(values, labels, more, message):
    with pytest.raises(ValueError, match=message):
        partition(values, labels, **more)


@pytest.mark.parametrize("shape", [0.1, 0.3])
def test_losses_with_a_peak_at_zero_are_split(shape: float):
    """80 % of the losses are near 0, as in a network in training, and the others near 4."""
    torch.manual_seed(0)
    right = torch.rand(20_000) < 0.8
    values = torch.where(
        right, torch.distributions.Gamma(shape, 1.0).sample((20_000,)), 3 + 1.5 * torch.randn(20_000).abs()
    )
    result = partition(values, torch.zeros(20_000, dtype=torch.long))
    assert result.separated.all()
    assert (result.trusted == right).float().mean() > 0.92


def memorised(rate: float, count: int = 20_000) -> tuple[Tensor, Tensor, Tensor]:
    """Returns losses of a network that has memorised 2 % of the wrong labels, the labels, and which are right."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(10, (count,), generator=generator)
    wrong = torch.rand(count, generator=generator) < rate
    other = (true + torch.randint(1, 10, (count,), generator=generator)) % 10
    labels = torch.where(wrong, other, true)
    z = torch.randn(count, 10, generator=generator)
    rows = torch.arange(count)
    z[rows, true] += 6 - 4 * rate + (2 - rate) * torch.randn(count, generator=generator)
    learned = (wrong & (torch.rand(count, generator=generator) < 0.02)).nonzero().squeeze(1)
    z[learned, labels[learned]] += 10
    return torch.nn.functional.cross_entropy(z, labels, reduction="none"), labels, ~wrong


@pytest.mark.parametrize(("rate", "share"), [(0.2, 0.93), (0.5, 0.9), (0.8, 0.8)])
def test_losses_of_a_network_in_training_are_split(rate: float, share: float):
    """A floor of 1e-6 trusts all labels at rate 0.2, and is right for 0.84 of them at rate 0.5."""
    values, labels, right = memorised(rate)
    result = partition(values, labels)
    assert result.separated.all()
    assert (result.trusted == right).float().mean() > share
