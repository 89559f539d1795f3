"""The benches of stages: their rows are right, and the published code computes the same as tadperf."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tadperf.bench.stages import matching, runner
from tadperf.config import NetConfig
from tadperf.errors import UserError
from tadperf.matching import gradient

CPU = torch.device("cpu")
TINY = matching.Case(
    (3, 8, 8),
    7,
    3,
    NetConfig.model_validate({"width": 5, "depth": 2}),
    ("tadperf", "tadperf bfloat16", "autograd", "published"),
)


@pytest.fixture
def tiny(monkeypatch, one_thread):
    monkeypatch.setitem(matching.SIZES, "tiny", TINY)
    monkeypatch.setattr(runner, "peak_memory", lambda *_: None)  # the real one starts a process


def test_the_published_iteration_equals_the_unroll(one_thread):
    p = matching.make_problem(TINY, CPU, torch.float64)
    truth = gradient.unroll(*p).images
    assert truth.norm() > 0
    assert matching.relative_error(matching.published(p), truth) < 1e-12


def test_a_problem_is_the_same_in_float32_and_float64(one_thread):
    p, double = matching.make_problem(TINY, CPU), matching.make_problem(TINY, CPU, torch.float64)
    assert torch.equal(p.images.double(), double.images)
    assert torch.equal(p.start.double(), double.start)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(p.steps, double.steps, strict=True))


def test_rows_of_an_iteration(tiny):
    rows = matching.measure("tiny", CPU, 2)
    runner.ratios(rows)
    assert [row["provider"] for row in rows] == list(TINY.providers)
    by_name = {row["provider"]: row for row in rows}
    for row in rows:
        assert 0 < row["q20_ms"] <= row["median_ms"] <= row["q80_ms"]
        assert row["over_published"] == pytest.approx(by_name["published"]["median_ms"] / row["median_ms"])
        assert row["gradient_error"] < (0.2 if "bfloat16" in row["provider"] else 1e-5)
    assert by_name["tadperf bfloat16"]["gradient_error"] > 1e-5  # otherwise it has not run in bfloat16


def test_ratios_stay_within_a_case():
    rows = [
        runner.make_row("refinement", case, family, family, np.array([ms]), peak_mb=mb)
        for case, family, ms, mb in (
            ("a", "tadperf", 2.0, 10.0),
            ("a", "eager", 6.0, None),
            ("a", "published", 8.0, 40.0),
            ("b", "tadperf", 5.0, 10.0),
            ("b", "inductor", 1.0, 1.0),
        )
    ]
    rows.append(runner.make_row("refinement", "a", "broken", "eager", error="no such thing"))
    runner.ratios(rows)
    assert [row["over_published"] for row in rows] == [4, pytest.approx(8 / 6), 1, None, None, None]
    assert [row["over_eager"] for row in rows] == [3, 1, 0.75, None, None, None]
    assert [row["memory_share"] for row in rows] == [0.25, None, 1, None, None, None]
    assert runner.lines(rows)[-1] == "a broken: no such thing"


def test_peak_memory_of_a_new_process():
    found = runner.peak_memory("matching", "digits", "tadperf", CPU)
    assert found is not None
    assert 100 < found < 2000  # PyTorch alone is 200 MB; in MB, not bytes
    assert runner.peak_memory("matching", "digits", "nobody", CPU) is None


def test_an_unknown_size():
    stage = runner.load("matching")
    assert runner.sizes(stage, None) == ["digits", "cifar10"]
    with pytest.raises(UserError, match="must be one of digits"):
        runner.sizes(stage, "digits,imagenet")
