"""Experts are shared by runs that would train the same ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tadperf.config.merge import merge
from tadperf.errors import UserError
from tadperf.experts.store import claim_folder
from tadperf.pipeline.prepare import prepare
from tadperf.task.task import Task, expert_identity


@pytest.mark.parametrize("mode", ["off", "oracle"])
def test_experts_without_trust_fit_whatever_its_other_settings_are(tmp_path, mode):
    """Settings of trust that a later version adds must not refuse stored experts that never read them."""
    stored = {"data": "a", "trust": {"mode": mode, "rounds": 2}}
    claim_folder(tmp_path / "experts", stored)
    claim_folder(tmp_path / "experts", {"data": "a", "trust": {"mode": mode, "rounds": 3, "budget": 0.05}})
    for other in ({"data": "b", "trust": stored["trust"]}, {"data": "a", "trust": {"mode": "on", "rounds": 2}}):
        with pytest.raises(UserError, match="its experts have"):
            claim_folder(tmp_path / "experts", other)
    claim_folder(tmp_path / "on", {"trust": {"mode": "on", "rounds": 2}})
    with pytest.raises(UserError, match="its experts have trust"):
        claim_folder(tmp_path / "on", {"trust": {"mode": "on", "rounds": 3}})


def test_the_precision_belongs_to_the_identity_of_experts_on_cuda_only():
    """A CPU always trains in float32. Stored float32 experts of earlier versions must still fit."""

    def task(precision: str, device: str) -> Task:
        prepared = prepare(merge("digits", sets=[f"experts.precision={precision}"], options={"device": "cpu"}))
        return replace(prepared, device=torch.device(device))

    on_cpu, on_cuda = (
        [expert_identity(task(name, device)) for name in ("float32", "bfloat16")] for device in ("cpu", "cuda")
    )
    assert on_cpu[0] == on_cpu[1]
    assert on_cpu[0]["cuda"] is None
    assert "precision" not in on_cpu[0]
    assert [identity["cuda"] for identity in on_cuda] == [{"tf32": True}, {"tf32": True, "precision": "bfloat16"}]
    assert {name for name in on_cuda[0] if on_cuda[0][name] != on_cuda[1][name]} == {"cuda"}
