"""The trust loop on CUDA: the verdicts of a CPU, no copy or wait in a proxy's step, and the fused operators."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import RunOnTwin

CASES = ["plain", "consistency", "one proxy, no graph", "pixels on the CPU"]
BLOCKING = ("blocking copy to device", "blocking copy to host", "wait")
VERDICTS = ("given", "working", "verdict", "decided", "suggested")


@pytest.fixture(scope="module")
def measured(run_on_twin: RunOnTwin) -> dict[str, Any]:
    return run_on_twin("trust_rounds.py")


@pytest.mark.parametrize("name", CASES)
def test_the_rounds_are_those_of_a_cpu(measured: dict[str, Any], name: str):
    rounds = measured[name]["rounds"]
    assert len(rounds) == 2
    for differences in rounds:
        assert {field: differences[field] for field in VERDICTS} == dict.fromkeys(VERDICTS, 0)
        assert differences["score"] < 1e-5
        assert differences["reliability"] < 1e-5
    assert measured[name]["problems"] == []


@pytest.mark.parametrize("name", CASES[:3])
def test_an_epoch_of_a_proxy_is_a_replay_that_waits_for_nothing(measured: dict[str, Any], name: str):
    steps, epochs = measured[name]["steps"], 2 if name == "one proxy, no graph" else 4
    assert not any(steps.get(kind) for kind in BLOCKING), steps
    assert steps["graph replay"] == epochs  # 3 or 5 steps
    assert steps["graph record"] == 0
    assert steps["async copy"] == epochs  # the random values
    assert steps["launch"] == epochs  # the position goes back to 0


def test_the_steps_of_a_proxy_on_pixels_on_the_cpu_wait_for_nothing(measured: dict[str, Any]):
    steps = measured["pixels on the CPU"]["steps"]
    assert not any(steps.get(kind) for kind in BLOCKING), steps
    assert steps["graph replay"] >= 10
    assert steps["graph record"] == 0
    assert steps["async copy"] == 2 * 2 * 2  # two epochs of two proxies: the random values, and the images
    # Four copies into the graph in a step; in an epoch 45 launches, most for the augmentation in plain PyTorch.
    assert steps["launch"] <= 4 * steps["graph replay"] + 45 * 4, steps


@pytest.mark.parametrize("name", CASES)
def test_verdicts_are_found_on_the_device(measured: dict[str, Any], name: str):
    """The fused operators run there. The state comes to the CPU once, in one copy for each of its six new fields.

    The soft targets are one copy more. The weights of the sources are fitted on the CPU: samples and labels go there, T
    comes back.
    """
    kernels, verdicts = measured[name]["kernels"], measured[name]["verdicts"]
    for kernel in ("per_sample_kernel", "mixture_kernel", "whiten_kernel", "rank_kernel", "forward_kernel"):
        assert kernels.get(kernel), kernels
    assert verdicts["async copy"] == 1  # the state before
    reaches = 0 if name == "one proxy, no graph" else 2  # one read for each reach
    assert verdicts["blocking copy to host"] <= 6 + 1 + 2 + 2 + reaches
    assert verdicts.get("blocking copy to device", 0) <= 3  # two random orders, and T
    assert verdicts["wait"] <= 30
