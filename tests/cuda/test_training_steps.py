"""A training step on CUDA: no copy and no wait outside of its CUDA graph, and the weights of a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import RunOnTwin

STEPS, EPOCHS = 8, 2
BLOCKING = ("blocking copy to device", "blocking copy to host", "wait")


@pytest.fixture(scope="module")
def measured(run_on_twin: RunOnTwin) -> dict[str, Any]:
    return run_on_twin("training_steps.py")


@pytest.mark.parametrize("name", ["plain", "weights", "soft", "gsam", "subset", "pixels on the device"])
def test_a_step_on_images_on_the_device_is_one_replay(measured: dict[str, Any], name: str):
    counts = measured[name]["counts"]
    assert not any(counts.get(kind) for kind in BLOCKING), counts
    assert counts["graph replay"] == STEPS
    assert counts["async copy"] == EPOCHS  # the draws of an epoch
    assert counts["launch"] == EPOCHS  # the position goes back to 0


def test_a_step_on_pixels_on_the_cpu_does_not_wait(measured: dict[str, Any]):
    counts = measured["pixels on the CPU"]["counts"]
    assert not any(counts.get(kind) for kind in BLOCKING), counts
    assert counts["graph replay"] == STEPS
    assert counts["async copy"] == 2 * EPOCHS  # the draws of an epoch, and its images


def test_the_snapshots_of_an_expert_are_not_awaited(measured: dict[str, Any]):
    counts = measured["expert"]["counts"]
    assert not any(counts.get(kind) for kind in BLOCKING[:2]), counts
    assert counts["async copy"] == 2 * EPOCHS  # the draws of an epoch, and a snapshot
    assert counts["wait"] == EPOCHS  # for a snapshot that is one epoch old


@pytest.mark.parametrize(
    "name", ["plain", "weights", "soft", "gsam", "subset", "pixels on the device", "pixels on the CPU", "expert"]
)
def test_the_weights_are_those_of_a_cpu(measured: dict[str, Any], name: str):
    assert measured[name]["error"] < 1e-5
