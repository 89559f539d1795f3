"""Proxies: their losses and their outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tadperf import seeds
from tadperf.compute import work_progress, workers
from tadperf.config import NetConfig, TrustConfig
from tadperf.nets.device_batches import DeviceDraws, batch_sizes
from tadperf.nets.problem import Problem
from tadperf.progress import silent
from tadperf.trust import proxies, proxy_batches
from tadperf.trust.proxies import (
    Rate,
    learning_rates,
    proxy_loss,
    proxy_problem,
    train_proxies,
    train_proxy,
)
from tadperf.trust.proxy_batches import EpochDraws, batch_on_device, draw_epoch, epoch_batches, with_image_shares
from tadperf.trust.state import TrustedView
from tadperf.trust.top_classes import Probabilities

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(count: int = 9) -> Problem:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    net = NetConfig.model_validate({"depth": 1, "width": 4})
    return Problem(images, torch.arange(count) % 3, ("a", "b", "c"), net, "none", 0, torch.device("cpu"))


def trust_config(**values: Any) -> TrustConfig:
    return TrustConfig.model_validate({"epochs": 2, "proxies": 2, "batch": 4, "mixup": False, **values})


def tensors(outputs: tuple[Tensor, Probabilities, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the losses, the probabilities and the features; a small set has all its probabilities."""
    losses, probabilities, features = outputs
    assert isinstance(probabilities, Tensor)
    return losses, probabilities, features


def test_the_loss_of_a_batch_is_the_weighted_mean_cross_entropy():
    p, weights = problem(), torch.linspace(0.1, 1, 9)
    target = torch.nn.functional.one_hot(p.labels, 3) * weights[:, None]

    def logits(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]

    (batch,) = epoch_batches(p, torch.arange(9), target, trust_config(batch=9), 0)
    loss = proxy_loss(logits, batch, 0.0)
    each = torch.nn.functional.cross_entropy(p.images[torch.arange(9)].flatten(1)[:, :3], p.labels, reduction="none")
    torch.testing.assert_close(loss, (weights * each).sum() / weights.sum())


@pytest.mark.parametrize("mixup", [False, True])
def test_a_batch_of_zero_weight_trains_nothing_and_gives_no_nan(mixup):
    """Nine samples in batches of four: the last batch has one sample."""
    p = problem()
    view = TrustedView(torch.arange(9), p.labels, torch.zeros(9))
    outputs = train_proxy(p, view, torch.arange(9), trust_config(mixup=mixup))
    assert all(values.isfinite().all() for values in tensors(outputs))
    weights = torch.zeros(9).index_fill_(0, torch.tensor([3]), 1.0)
    outputs = train_proxy(p, view._replace(weights=weights), torch.arange(9), trust_config(mixup=mixup))
    assert all(values.isfinite().all() for values in tensors(outputs))


def test_mixup_mixes_images_and_labels_of_one_batch_with_the_same_share():
    """Nine samples in batches of four: the last batch has one sample."""
    p, config, seen = problem(), trust_config(mixup=True), []
    target = torch.nn.functional.one_hot(p.labels, 3).float()
    draws = draw_epoch(p, 9, config, 0)
    assert draws.pair is not None
    assert draws.share is not None

    def logits(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1)[:, :3]

    batches = list(epoch_batches(p, torch.arange(9), target, config, 0))
    for share, partner, batch in zip(draws.share, draws.pair.split([4, 4, 1]), batches, strict=True):
        assert sorted(partner.tolist()) == list(range(len(batch.x)))
        x, y = (values[partner] + share * (values - values[partner]) for values in (batch.x, batch.target))
        loss = proxy_loss(logits, batch, 0.0)
        torch.testing.assert_close(seen[-1], x)
        torch.testing.assert_close(loss, -(y * x.flatten(1)[:, :3].log_softmax(1)).sum() / y.sum())


@pytest.mark.parametrize("values", [{}, {"mixup": True}, {"consistency": 0.5}], ids=str)
def test_the_number_of_batches_that_are_augmented_at_once_changes_no_bit(values, monkeypatch):
    p, target = replace(problem(), augment="color_crop_cutout_flip_scale_rotate"), torch.rand(9, 3)
    calls = []
    for chunk in (1, 1 << 19):
        monkeypatch.setattr(proxy_batches, "CPU_CHUNK", chunk)
        calls.append(list(epoch_batches(p, torch.arange(9), target, trust_config(**values), 0)))
    for batch, other in zip(*calls, strict=True):
        for field, expected in zip(batch, other, strict=True):
            assert field is expected is None or torch.equal(field, expected)
    assert [len(batch.x) for batch in calls[0]] == [4, 4, 1]


@pytest.mark.parametrize("values", [{}, {"mixup": True}, {"mixup": True, "consistency": 0.5}], ids=str)
def test_a_batch_that_the_device_makes_equals_that_of_a_cpu(values):
    p, config = replace(problem(), augment="color_crop_cutout_flip_scale_rotate"), trust_config(**values)
    index, target = torch.randperm(9, generator=torch.Generator().manual_seed(1)), torch.rand(9, 3)
    source = DeviceDraws[EpochDraws](torch.device("cpu"))
    for epoch in range(2):
        source.load(with_image_shares(draw_epoch(p, 9, config, epoch), config.batch))
        expected = list(epoch_batches(p, index, target, config, epoch))
        assert [len(batch.x) for batch in expected] == batch_sizes(9, config.batch)
        for batch in expected:
            ours = batch_on_device(p.images, index, target, source.next_rows(len(batch.x)))
            for field, value in zip(ours, batch, strict=True):
                assert (field is None) == (value is None)
                assert field is None or value is None or torch.equal(field, value)


def test_the_draws_of_an_epoch_move_to_a_device():
    p = replace(problem(), augment="crop_color")
    draws = draw_epoch(p, 9, trust_config(mixup=True, consistency=0.5), 0)
    moved = draws.to(torch.device("meta"))
    fields, others = tree_leaves(draws), tree_leaves(moved)
    assert [field if field is None else (field.shape, field.dtype) for field in fields] == [
        field if field is None else (field.shape, field.dtype) for field in others
    ]
    assert {field.device.type for field in others if field is not None} == {"meta"}
    assert draw_epoch(p, 9, trust_config(), 0).to(torch.device("cpu")).pair is None


def test_a_proxy_tests_the_samples_that_it_is_asked_for(monkeypatch):
    """In batches of two, one epoch and then the last one, whose logits come from the features."""
    monkeypatch.setattr(proxies, "EVAL_BATCH", 2)
    p, tested = problem(), torch.tensor([8, 1, 5])
    view = TrustedView(torch.arange(9), p.labels, torch.ones(9))
    every = tensors(train_proxy(p, view, torch.arange(9), trust_config()))
    losses, probabilities, features = tensors(train_proxy(p, view, tested, trust_config()))
    torch.testing.assert_close(losses, every[0][tested])
    torch.testing.assert_close(probabilities, every[1][tested])
    assert torch.equal(features, every[2])
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))


def test_held_out_outputs_come_from_the_proxy_that_did_not_see_the_sample():
    p, config = problem(), trust_config(held_out=True)
    view = TrustedView(torch.arange(9), p.labels, torch.ones(9))
    mean = tensors(train_proxies(p, view, config, silent))
    fold = torch.randperm(9, generator=seeds.generator(0, "proxy folds")) % 2
    for m in range(2):
        own = replace(p, seed=seeds.derive(0, "proxy", m))
        part = TrustedView(*(values[fold != m] for values in view))
        losses, probabilities, features = tensors(train_proxy(own, part, torch.arange(9), config))
        assert torch.equal(mean[0][fold == m], losses[fold == m])
        assert torch.equal(mean[1][fold == m], probabilities[fold == m])
        assert torch.equal(mean[2].chunk(2, 1)[m], features)


@pytest.mark.parametrize(("held_out", "mixup"), [(True, False), (False, True)])
def test_the_work_of_the_proxies_is_what_they_count(monkeypatch, held_out, mixup):
    expected: list[int] = []
    counted: list[int] = []

    @contextlib.contextmanager
    def count_here(progress: object, stage: str, total: int) -> Iterator[None]:
        expected.append(total)
        with work_progress.counting(counted.append):
            yield

    monkeypatch.setattr(proxies, "reporting", count_here)
    monkeypatch.setattr(workers, "can_fork", lambda: False)
    p = problem()
    view = TrustedView(torch.arange(7), p.labels[:7], torch.ones(7))
    train_proxies(p, view, trust_config(held_out=held_out, mixup=mixup), silent)
    assert [sum(counted)] == expected


def test_soft_labels_of_one_class_train_as_hard_labels_do():
    p, weights = problem(), torch.linspace(0.1, 1, 9)
    hard = TrustedView(torch.arange(9), p.labels, weights)
    soft = hard._replace(labels=torch.nn.functional.one_hot(p.labels, 3).float())
    first, second = (train_proxies(p, view, trust_config(), silent) for view in (hard, soft))
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))
    mixed = soft._replace(labels=torch.full((9, 3), 1 / 3))
    assert not torch.equal(train_proxies(p, mixed, trust_config(), silent).losses, first.losses)


def test_the_rate_of_one_cycle_grows_and_falls():
    assert learning_rates(trust_config(epochs=3, lr=0.2)) == [0.2, 0.2, 0.2]
    rates = learning_rates(trust_config(epochs=10, lr=0.2, schedule="one-cycle"))
    assert rates[:3] == pytest.approx([0.05, 0.15, 0.1875])
    assert rates[-1] == pytest.approx(0.0125)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    rate = Rate(trust_config(epochs=10, lr=0.2, schedule="one-cycle"), torch.device("cpu"))
    for epoch in range(10):
        rate.set(epoch)
        assert rate.value == rates[epoch]
    rate.set(10)
    assert rate.value == rates[9]


@pytest.mark.parametrize(
    "values",
    [{"momentum": 0.5}, {"weight_decay": 0.1}, {"schedule": "one-cycle"}, {"width": 5}, {"augment": "flip"}],
    ids=str,
)
def test_the_settings_of_the_proxies_change_their_outputs(values):
    p = problem()
    view = TrustedView(torch.arange(9), p.labels, torch.ones(9))
    plain, changed = (train_proxies(p, view, trust_config(**v), silent) for v in ({}, values))
    assert not torch.equal(plain.losses, changed.losses)


def test_the_proxies_have_a_width_and_an_augmentation_of_their_own():
    p = problem()
    assert proxy_problem(p, trust_config()) == p
    own = proxy_problem(p, trust_config(width=7, augment="flip"))
    assert (own.net.width, own.net.depth, own.augment) == (7, 1, "flip")
