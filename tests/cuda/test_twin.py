"""The twin of a CUDA device itself: it refuses what CUDA refuses, and counts launches, copies and waits."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import RunOnTwin


@pytest.fixture(scope="module")
def rules(run_on_twin: RunOnTwin) -> dict[str, Any]:
    return run_on_twin("twin_rules.py")


def test_operators_refuse_cpu_tensors_where_cuda_does(rules: dict[str, Any]):
    assert len(rules["refused"]) == 6
    for name, error in rules["refused"].items():
        assert error, f"{name} is not refused"


def test_a_recorded_graph_refuses_waits_and_pageable_copies(rules: dict[str, Any]):
    assert len(rules["in a graph"]) == 7
    for name, (outside, inside) in rules["in a graph"].items():
        assert not outside, f"{name} is refused outside of a graph: {outside}"
        assert "while a CUDA graph is recorded" in inside, f"{name} is not refused: {inside}"


def test_counts(rules: dict[str, Any]):
    assert rules["counted"] == {
        "a kernel": {"launch": 1},
        "a view": {},
        "a scalar of the CPU": {"launch": 1},
        "a value written at a mask": {"launch": 2},
        "a blocking copy": {"blocking copy to device": 1},
        "a copy of pinned memory": {"async copy": 1},
        "a read": {"wait": 1},
        "a forward and a backward pass": {"launch": 4},  # mul and sum, the ones and mul
    }


def test_recording_changes_nothing_and_a_replay_computes_with_new_values(rules: dict[str, Any]):
    assert rules["graph"] == [[0, 0], [0, 0], [3, 3], [8, 8]]


def test_a_missing_wait_between_two_streams_is_found(rules: dict[str, Any]):
    found = rules["streams"]
    assert found["ordered"] == found["freed and recorded"] == []
    (no_wait,) = found["no wait"]
    assert "reads what stream" in no_wait
    (freed,) = found["freed"]
    assert "frees memory that stream" in freed


def test_graphs_that_share_memory_or_a_workspace_may_not_run_at_once(rules: dict[str, Any]):
    found = rules["graphs"]
    assert found["apart"] == []
    for case in ("one pool", "one stream"):
        (problem,) = found[case]
        assert "writes what stream" in problem
