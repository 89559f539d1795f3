"""Every tensor that trust creates is on the device of its inputs.

PyTorch's default device is "meta" in these tests: a tensor created without `device=` would have no values.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tadperf.compute.torch_settings import torch_settings
from tadperf.config import TrustConfig
from tadperf.kernels import Reliability, reliability
from tadperf.trust.neighbours import NeighbourEstimate, estimate_from_neighbours
from tadperf.trust.partition import partition
from tadperf.trust.proxies import ProxyOutputs
from tadperf.trust.recalibrate import recalibrate
from tadperf.trust.state import DTYPES, RELABELLED, TRUSTED, as_given
from tadperf.trust.verdicts import assign_verdicts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def clouds() -> tuple[Tensor, Tensor, Tensor]:
    """Returns features of three clouds, labels with 20 % errors, and losses."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(3).repeat(40)
    features = 3 * torch.eye(3, 8)[clean] + torch.randn(120, 8, generator=generator)
    wrong = torch.arange(120) % 5 == 0
    losses = torch.where(wrong, 3.0, 0.2) + 0.1 * torch.rand(120, generator=generator)
    return features, torch.where(wrong, (clean + 1) % 3, clean), losses


@pytest.mark.parametrize("options", [{}, {"dynamic_threshold": False}, {"class_wise": False}], ids=str)
def test_partition(clouds, options: dict[str, Any]):
    _, labels, losses = clouds
    expected = partition(losses, labels, **options)
    with torch.device("meta"):
        result = partition(losses, labels, **options)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.fixture
def reliability_on_cpu(monkeypatch):
    """Runs the operator on a default device with values: the operators have their own tests."""

    def on_cpu(*tensors: Tensor) -> Reliability:
        with torch.device("cpu"):
            return reliability(*tensors)

    monkeypatch.setattr("tadperf.trust.recalibrate.nearest_anchors", on_cpu)


@pytest.mark.usefixtures("reliability_on_cpu")
def test_recalibrate(clouds):
    features, labels, losses = clouds
    split = partition(losses, labels)
    clean = torch.arange(3).repeat(40)
    arguments = (features, labels, split.trusted * split.posterior, clean, clean, split.trusted, 3)
    expected = recalibrate(*arguments)
    with torch.device("meta"):
        result = recalibrate(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("fold_size", [2**25, 0])
def test_neighbours(clouds, monkeypatch, fold_size):
    features, labels, _ = clouds
    monkeypatch.setattr("tadperf.trust.neighbours.FOLD_SIZE", fold_size)
    expected = estimate_from_neighbours(features, labels, 3, 0)
    with torch.device("meta"):
        result = estimate_from_neighbours(features, labels, 3, 0)
    assert torch.equal(result.posterior, expected.posterior)


@pytest.mark.usefixtures("reliability_on_cpu")
@pytest.mark.parametrize("number", [1, 2])
def test_verdicts(clouds, number):
    features, labels, losses = clouds
    probabilities = torch.nn.functional.one_hot(labels, 3) * 0.8 + 0.05
    outputs, config = ProxyOutputs(losses, probabilities, features), TrustConfig()
    before = as_given(labels, ("a", "b", "c"))
    expected = assign_verdicts(outputs, before, number, config, 0)
    with torch.device("meta"):
        state = assign_verdicts(outputs, before, number, config, 0)
    assert all(torch.equal(getattr(state, name), getattr(expected, name)) for name in DTYPES)
    assert set(expected.verdict.tolist()) >= {TRUSTED, RELABELLED}


def test_verdicts_do_not_depend_on_the_settings_of_tf32(clouds, monkeypatch):
    """The products that decide run with full precision, and the caller's setting is restored."""
    seen = []

    def estimate(features: Tensor, labels: Tensor, classes: int, *_: object) -> NeighbourEstimate:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return estimate_from_neighbours(features, labels, classes, 0)

    monkeypatch.setattr("tadperf.trust.verdicts.estimate_from_neighbours", estimate)
    features, labels, losses = clouds
    outputs = ProxyOutputs(losses, torch.full((120, 3), 1 / 3), features)
    with torch_settings(tf32=True):
        assign_verdicts(outputs, as_given(labels, ("a", "b", "c")), 1, TrustConfig(), 0)
        seen.append(torch.backends.cuda.matmul.allow_tf32)
    assert seen == [False, True]


def test_as_given(clouds):
    _, labels, _ = clouds
    with torch.device("meta"):
        assert as_given(labels, ("a", "b", "c")).decided.device.type == "cpu"
