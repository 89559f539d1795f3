"""One step of matching and of training on CUDA: bfloat16 maps end to end, and images padded to 4 channels."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import RunOnTwin

LOOPS = pytest.mark.parametrize("loop", ["matching", "training"])


@pytest.fixture(scope="module")
def measured(run_on_twin: RunOnTwin) -> dict[str, Any]:
    return run_on_twin("step_forms.py", 16, 16, 6)


@LOOPS
def test_no_cast_to_float32_lies_between_a_bfloat16_convolution_and_its_norm(measured: dict[str, Any], loop: str):
    assert measured[f"{loop} float32"]["types"] == ["float32"]
    assert measured[f"{loop} bfloat16"]["types"] == ["bfloat16"]
    assert measured[f"{loop} bfloat16"]["bytes"] < 0.65 * measured[f"{loop} float32"]["bytes"]


@LOOPS
@pytest.mark.parametrize("form", ["float32", "bfloat16", "padded"])
def test_gradients_are_float32_and_near_those_of_a_cpu(measured: dict[str, Any], loop: str, form: str):
    row = measured[f"{loop} {form}"]
    assert set(row["dtypes"]) == {"torch.float32"}
    assert row["error"] < (0.15 if form == "bfloat16" else 1e-5)


@LOOPS
def test_padding_adds_few_small_kernels(measured: dict[str, Any], loop: str):
    """Each of a step and its products pads images and kernels, and cuts the gradients."""
    padded, plain = measured[f"{loop} padded"], measured[f"{loop} float32"]
    assert 0 < padded["kernels"] - plain["kernels"] <= 6
    assert padded["bytes"] < 1.2 * plain["bytes"]
