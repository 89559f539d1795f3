"""FTD and DATM change config values, the start range, and the samples that images start from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tadperf import seeds
from tadperf.config import Config, ExpertConfig, MatchConfig
from tadperf.config.presets import BASES
from tadperf.matching.starts import correctly_classified, start_range


def match(**values: Any) -> MatchConfig:
    return MatchConfig(**values)


def test_a_method_sets_fields_that_are_not_set():
    plain, ftd = Config(), Config(match=match(method="ftd"))
    assert plain.match.method == "mtt"
    assert BASES["mtt"] == {}
    assert (ftd.experts.rho, ftd.experts.alpha, ftd.match.ema) == (0.01, 0.3, 0.9995)
    assert (plain.experts.rho, plain.match.ema) == (0.0, 0.0)
    for method, sections in BASES.items():
        config = Config.model_validate({"match": {"method": method}})
        for section, values in sections.items():
            assert values.items() <= config.model_dump()[section].items()
        assert Config.model_validate(config.model_dump()) == config


def test_a_field_that_is_set_stays_even_at_its_default():
    config = Config(match=match(method="ftd", ema=0.0), experts=ExpertConfig(rho=0.0))
    assert (config.match.ema, config.experts.rho, config.experts.alpha) == (0.0, 0.0, 0.3)
    stored: dict[str, Any] = Config(match=match(iterations=7)).model_dump()
    stored["match"]["method"] = "datm"
    assert Config.model_validate(stored).match.easy == 1.0  # a stored config sets every field


def test_the_start_range_widens_from_easy_to_hard():
    config = match(iterations=100, min_start=2, max_start=12, easy=0.5, widen=0.4)
    assert [start_range(config, i) for i in (0, 8, 20, 39, 40, 99)] == [
        (2, 7),
        (2, 8),
        (2, 10),
        (2, 12),
        (2, 12),
        (2, 12),
    ]
    assert {start_range(match(max_start=9), i) for i in range(100)} == {(0, 9)}
    assert start_range(match(max_start=0, easy=0.0, widen=1.0), 0) == (0, 0)


@settings(max_examples=50)
@given(
    low=st.integers(0, 20), span=st.integers(0, 50), easy=st.floats(0, 1), widen=st.floats(0, 1), n=st.integers(1, 60)
)
def test_the_start_range_only_grows_and_ends_at_its_full_width(low, span, easy, widen, n):
    config = match(iterations=n, min_start=low, max_start=low + span, easy=easy, widen=widen)
    ranges = [start_range(config, i) for i in range(n + 1)]
    assert all(low == first <= last <= low + span for first, last in ranges)
    assert ranges == sorted(ranges)
    assert ranges[-1] == (low, low + span)


def test_the_full_range_draws_the_same_starts_as_a_fixed_range():
    """randint(first, last + 1) and randint(n) use the same bits of the generator."""
    for iteration in range(50):
        one, two = (seeds.generator(3, "match", iteration) for _ in range(2))
        assert torch.equal(torch.randint(0, 21, (), generator=one), torch.randint(21, (), generator=two))
        assert torch.equal(one.get_state(), two.get_state())


class Answers:
    """Fake experts with a table [E, N]: expert e predicts class table[e, i] for image i, whose pixels are all i."""

    def __init__(self, table: list[list[int]]):
        self.table = torch.tensor(table)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.table)

    def snapshot(self, expert: int, epoch: int) -> torch.Tensor:
        self.asked.append(expert)
        return torch.tensor(float(expert))

    def __call__(self, theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(self.table[int(theta), x[:, 0, 0, 0].long()], 4).float()


@pytest.mark.parametrize("batch", [1, 3, 1024])
@pytest.mark.parametrize(
    ("labels", "table", "least", "expected", "asked"),
    [
        ([0, 0, 1, 1], [[0, 1, 1, 1], [9, 9, 9, 9]], 1, [1, 0, 1, 1], [0]),
        ([0, 0, 0, 1, 1], [[0, 1, 1, 1, 0], [1, 0, 1, 0, 1], [3, 3, 3, 3, 3]], 2, [1, 1, 0, 1, 1], [0, 1]),
        # only class 0 is short after the first expert, so the second one sees class 0 alone
        ([0, 0, 0, 1, 1], [[0, 1, 1, 1, 1], [1, 0, 1, 0, 0], [3, 3, 3, 3, 3]], 2, [1, 1, 0, 1, 1], [0, 1]),
        ([0, 0, 1, 1], [[0, 0, 2, 2], [0, 0, 3, 3]], 2, [1, 1, 1, 1], [0, 1]),  # no expert classifies class 1 correctly
        ([-1, 0, 1, 1], [[0, 0, 1, 0]], 1, [0, 1, 1, 0], [0]),  # the first sample may not be returned
        ([-1, 0, 1, 1], [[3, 3, 1, 1]], 1, [0, 1, 1, 1], [0]),
    ],
)
def test_correctly_classified_samples(labels, table, least, expected, asked, batch):
    images = torch.arange(len(labels)).float()[:, None, None, None]
    experts: Any = Answers([[min(a, 3) for a in row] for row in table])
    mask = correctly_classified(experts, experts, images, torch.tensor(labels), 5, least, batch)
    assert mask.tolist() == [bool(e) for e in expected]
    assert experts.asked == asked
