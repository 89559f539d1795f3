"""Further sources in the dual loop: probabilities and features that a user brings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tadperf.config import NetConfig, TrustConfig
from tadperf.nets.problem import Problem
from tadperf.trust.loop import dual_loop
from tadperf.trust.metrics import compare_with_clean
from tadperf.trust.proxies import ProxyOutputs, compact_features
from tadperf.trust.signals import join_features
from tadperf.trust.state import as_given
from tadperf.trust.verdicts import assign_verdicts

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("a", "b", "c", "d")


def blind_proxies(each: int = 100) -> tuple[ProxyOutputs, Tensor, Tensor]:
    """Returns outputs of proxies that have learned nothing, labels with 30 % errors, and the clean labels."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(4).repeat(each)
    wrong = torch.rand(len(clean), generator=generator) < 0.3
    labels = torch.where(wrong, (clean + 1) % 4, clean)
    noise = torch.randn(len(clean), 16, generator=generator)
    p = torch.full((len(clean), 4), 0.25)
    return ProxyOutputs(torch.full((len(clean),), 1.386), p, compact_features(noise, 16, 0)), labels, clean


def good_evidence(clean: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(clean, 4) * 0.6 + 0.1


def good_features(clean: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 4 * torch.eye(4, 20)[clean] + torch.randn(len(clean), 20, generator=generator)


@pytest.mark.parametrize("source", ["evidence", "features"])
def test_a_good_source_finds_the_errors_that_the_proxies_cannot_see(source):
    outputs, labels, clean = blind_proxies()
    given: dict[str, Any] = {
        "evidence": {"evidence": (good_evidence(clean),)},
        "features": {"features": good_features(clean)},
    }
    before, config = as_given(labels, NAMES), TrustConfig()
    alone = assign_verdicts(outputs, before, 1, config, 0)
    state = assign_verdicts(outputs, before, 1, config, 0, **given[source])
    figures = compare_with_clean(state, clean)
    assert figures["view_accuracy"] > 0.95
    assert figures["coverage"] > 0.6
    assert compare_with_clean(alone, clean)["view_accuracy"] < 0.8


def test_features_count_as_much_as_those_of_all_proxies():
    outputs, _, clean = blind_proxies()
    two = outputs._replace(features=torch.cat([outputs.features] * 2, 1))
    joined = join_features(two, good_features(clean).half(), 0).features
    torch.testing.assert_close(joined[:, :32], two.features)
    torch.testing.assert_close(joined[:, 32:].norm(dim=1), two.features.norm(dim=1))


def test_without_sources_the_outputs_stay_as_they_are():
    outputs, _, _ = blind_proxies()
    assert join_features(outputs, None, 0) is outputs


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            {"evidence": (torch.ones(400, 4) / 4, torch.ones(399, 4) / 4)},
            r"evidence: .* of source 1: must be \[400, 4\]",
        ),
        ({"evidence": (torch.ones(400, 5) / 5,)}, r"evidence: .* of source 0: must be \[400, 4\]"),
        ({"features": torch.ones(399, 3)}, r"features: .*: must be \[400, D\]"),
        ({"features": torch.ones(400)}, r"features: .*: must be \[400, D\]"),
    ],
    ids=["rows", "classes", "features", "vector"],
)
def test_a_shape_that_does_not_fit_is_an_error(sources, message):
    outputs, labels, _ = blind_proxies()
    with pytest.raises(ValueError, match=message):
        assign_verdicts(outputs, as_given(labels, NAMES), 1, TrustConfig(), 0, **sources)


def test_the_dual_loop_passes_the_sources_to_every_round():
    _, labels, clean = blind_proxies(40)
    pixels = torch.randn(160, 1, 8, 8, generator=torch.Generator().manual_seed(0))  # the images tell nothing
    net = NetConfig.model_validate({"depth": 1, "width": 4})
    problem = Problem(pixels, labels, NAMES, net, "none", 0, torch.device("cpu"))
    config = TrustConfig.model_validate({"rounds": 2, "proxies": 2, "epochs": 2})
    result = dual_loop(problem, config, evidence=(good_evidence(clean),), features=good_features(clean))
    figures = [compare_with_clean(state, clean) for state in result.rounds]
    assert [f["view_accuracy"] > 0.93 for f in figures] == [True] * len(figures)
    assert dual_loop(problem, config).state.score.tolist() != result.state.score.tolist()
