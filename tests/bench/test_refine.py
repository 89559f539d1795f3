"""The bench of a refinement round generates the same candidates in a batch and one after another."""

from __future__ import annotations

import pytest
import torch

from tadperf.bench.stages import refinement, runner

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_batch_gives_the_same_candidates_as_one_after_another(monkeypatch):
    case = refinement.SIZES["digits"]
    small = case._replace(
        anomalies=2,
        candidates=3,
        refine=case.refine.model_copy(update={"steps": 4, "strength": 0.5}),
        diffusion=case.diffusion.model_copy(update={"width": 8}),
        detector=case.detector.model_copy(update={"width": 8, "depth": 1}),
    )
    monkeypatch.setitem(refinement.SIZES, "digits", small)
    monkeypatch.setattr(runner, "peak_memory", lambda *_: None)
    rows = refinement.measure("digits", torch.device("cpu"), 1, ("tadperf", "published"))
    assert [row["provider"] for row in rows] == ["tadperf", "published"]
    assert rows[0]["note"] in {f"2 x 3 candidates, pixels differ by {difference} of 255" for difference in (0, 1)}
    assert all(row["median_ms"] > 0 for row in rows)
    candidates = refinement.make_round(small, "tadperf", torch.device("cpu"))()
    assert tuple(candidates.shape) == (6, 1, 8, 8)
    assert candidates.float().std() > 1
