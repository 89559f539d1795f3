"""The list of operators: every operator registers itself, with its implementations."""

from __future__ import annotations

import pytest
import torch

import tadperf.kernels
from tadperf.kernels import gpu, implementations, native, registry


def test_all_operators_are_listed_and_public():
    names = set(implementations())
    assert names == {
        "conv3x3",
        "differentiable_augment",
        "diverse_pick",
        "mixture",
        "norm_relu_pool",
        "norm_relu_pool_dual",
        "per_sample",
        "per_sample_linear",
        "reliability",
        "trajectory_distance",
    }
    assert names <= set(tadperf.kernels.__all__)
    assert all(hasattr(tadperf.kernels, name) for name in tadperf.kernels.__all__)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_implementations(monkeypatch, cuda, triton, compiled):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(gpu, "available", lambda: triton)
    monkeypatch.setattr(native, "available", lambda: compiled)
    found = implementations()
    cpu = "native" if compiled else "reference"
    assert found.pop("differentiable_augment")["cpu"] == "reference"
    assert {row["cpu"] for row in found.values()} == {cpu}
    assert found["per_sample"]["cuda"] == ("not available" if not cuda else "triton" if triton else "reference")
    assert found["conv3x3"]["cuda"] == ("reference" if cuda else "not available")


def test_an_operator_registers_itself(monkeypatch):
    monkeypatch.setattr(registry, "_operators", {})
    registry.register("sum", cuda="reference")
    assert list(implementations()) == ["sum"]


def test_a_reason_is_given_only_if_compiled_code_is_absent():
    assert native.available() == (native.reason() == "")
