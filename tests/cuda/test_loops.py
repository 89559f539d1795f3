"""Training steps and matching iterations on CUDA: no copy that blocks, and the results of a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import RunOnTwin

STEPS, EPOCHS, ITERATIONS = 8, 4, 5
BLOCKING = ("blocking copy to device", "blocking copy to host", "wait")


@pytest.fixture(scope="module")
def measured(run_on_twin: RunOnTwin) -> dict[str, Any]:
    return run_on_twin("loops.py")


@pytest.fixture
def training(measured: dict[str, Any]) -> dict[str, Any]:
    return measured["training"]


@pytest.fixture
def matching(measured: dict[str, Any]) -> dict[str, Any]:
    return measured["matching"]


@pytest.mark.parametrize(
    "name", ["plain", "weights", "soft", "gsam", "subset", "pixels on the device", "bfloat16", "bfloat16 soft"]
)
def test_steps_on_images_on_the_device_are_replays(training: dict[str, Any], name: str):
    counts = training[name]["counts"]
    assert not any(counts.get(kind) for kind in BLOCKING), counts
    assert counts["graph replay"] == STEPS / 4
    assert counts["async copy"] == EPOCHS / 2  # the draws of two epochs
    assert counts["launch"] == 2 * EPOCHS / 2  # the position goes back to 0, and the learning rate is written


def test_a_new_learning_rate_needs_no_new_graph(training: dict[str, Any]):
    found = training["decay"]
    assert found["graphs"] == 1
    assert found["error"] < 1e-5


def test_a_step_on_pixels_on_the_cpu_does_not_wait(training: dict[str, Any]):
    counts = training["pixels on the CPU"]["counts"]
    assert not any(counts.get(kind) for kind in BLOCKING), counts
    assert counts["graph replay"] == STEPS
    assert counts["async copy"] == 2 * EPOCHS  # the draws of an epoch, and its images
    # The augmentation in plain PyTorch, the learning rate, and two copies into the graph
    assert counts["launch"] <= 2 * STEPS + 35 * EPOCHS


def test_the_snapshots_of_an_expert_are_not_awaited(training: dict[str, Any]):
    counts = training["expert"]["counts"]
    assert not any(counts.get(kind) for kind in BLOCKING[:2]), counts
    assert counts["async copy"] == 3 * EPOCHS / 2  # the draws of two epochs, and a snapshot of each
    assert counts["wait"] == EPOCHS  # for a snapshot that is one epoch old


@pytest.mark.parametrize(
    "name", ["plain", "weights", "soft", "gsam", "subset", "pixels on the device", "pixels on the CPU", "expert"]
)
def test_the_weights_are_those_of_a_cpu(training: dict[str, Any], name: str):
    assert training[name]["error"] < 1e-5


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 soft"])
def test_bfloat16_maps_give_nearly_the_weights_of_float32(training: dict[str, Any], name: str):
    assert 1e-6 < training[name]["error"] < 0.1  # after 16 steps


def test_a_wide_head_is_tested_by_one_operator(training: dict[str, Any]):
    on_device, on_cpu = training["wide head"]["scores"]
    assert on_device == on_cpu
    assert on_cpu > 0.5
    assert "per_sample_linear" in training["wide head"]["kernels"]


@pytest.mark.parametrize(("name", "trajectories"), [("one trajectory", 1), ("three trajectories", 3)])
def test_a_matching_iteration_does_not_wait(matching: dict[str, Any], name: str, trajectories: int):
    counts = matching[name]["counts"]
    assert not any(counts.get(kind) for kind in BLOCKING[:2]), counts
    assert counts["wait"] == ITERATIONS  # for the iteration before the one that was launched last
    assert counts["async copy"] == ITERATIONS * (trajectories + 1)  # the draws, and the numbers of an iteration
    assert counts["graph replay"] == ITERATIONS * trajectories


@pytest.mark.parametrize("name", ["one trajectory", "three trajectories"])
def test_matching_gives_the_results_of_a_cpu(matching: dict[str, Any], name: str):
    assert matching[name]["images"] < 1e-5
    assert matching[name]["losses"] < 1e-5
    assert [sorted(layers) for layers in matching[name]["layers"] if layers is not None] == [["0", "1", "5"]] * 9


def test_an_iteration_that_is_read_late_is_undone_with_the_same_bytes(matching: dict[str, Any]):
    assert matching["diverging"] == {"undone": 4, "same": True}
