"""Proxies: their losses and their outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tadperf.config import NetConfig, TrustConfig
from tadperf.nets.problem import Problem
from tadperf.trust.proxies import epoch_losses, train_proxies, train_proxy
from tadperf.trust.state import TrustedView, as_given

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(count: int = 9) -> Problem:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    net = NetConfig.model_validate({"depth": 1, "width": 4})
    return Problem(images, torch.arange(count) % 3, ("a", "b", "c"), net, "none", 0, torch.device("cpu"))


def trust_config(**values: Any) -> TrustConfig:
    return TrustConfig.model_validate({"epochs": 2, "proxies": 2, "batch": 4, "mixup": False, **values})


def test_the_loss_of_a_batch_is_the_weighted_mean_cross_entropy():
    p, weights = problem(), torch.linspace(0.1, 1, 9)
    target = torch.nn.functional.one_hot(p.labels, 3) * weights[:, None]

    def logits(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]

    (loss,) = epoch_losses(logits, p, torch.arange(9), target, trust_config(batch=9), 0)
    each = torch.nn.functional.cross_entropy(p.images[torch.arange(9)].flatten(1)[:, :3], p.labels, reduction="none")
    torch.testing.assert_close(loss, (weights * each).sum() / weights.sum())


@pytest.mark.parametrize("mixup", [False, True])
def test_a_batch_of_zero_weight_trains_nothing_and_gives_no_nan(mixup):
    """Nine samples in batches of four: the last batch has one sample."""
    p = problem()
    view = TrustedView(torch.arange(9), p.labels, torch.zeros(9))
    outputs = train_proxy(p, view, trust_config(mixup=mixup))
    assert all(values.isfinite().all() for values in outputs)
    weights = torch.zeros(9).index_fill_(0, torch.tensor([3]), 1.0)
    outputs = train_proxy(p, view._replace(weights=weights), trust_config(mixup=mixup))
    assert all(values.isfinite().all() for values in outputs)


def test_progress_of_each_round_starts_at_zero():
    calls: list[tuple[str, int, int]] = []

    def record(stage: str, done: int, total: int, **values: object) -> None:
        calls.append((stage, done, total))

    p = problem()
    train_proxies(p, as_given(p.labels, p.class_names).view(), trust_config(), record)
    assert calls[0] == ("trust:proxies", 0, 2)
    assert calls[-1] == ("trust:proxies", 2, 2)
