"""Networks that train side by side: each on its own stream, the same results as one by one, and no missing wait."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import RunOnTwin


@pytest.fixture(scope="module")
def measured(run_on_twin: RunOnTwin) -> dict[str, Any]:
    return run_on_twin("side_by_side.py")


def test_parts_run_in_turn_and_the_caller_waits_before_it_reads(measured: dict[str, Any]):
    """Three tasks of two parts on the streams 1 and 2; the caller is on stream 0. ["wait", a, b]: a waits for b."""
    assert measured["events"]["results"] == [0, 11, 22]
    assert measured["events"]["events"] == [
        ["wait", 1, 0],
        ["wait", 2, 0],
        ["part", 0, 1],
        ["part", 1, 2],
        ["part", 0, 1],
        ["part", 1, 2],
        ["wait", 0, 1],
        ["wait", 0, 2],
        ["finish", 0],
        ["finish", 0],
        ["wait", 1, 0],  # so the third task sees the first two
        ["part", 2, 1],
        ["part", 2, 1],
        ["wait", 0, 1],
        ["finish", 0],
        ["wait", 0, 1],
        ["wait", 0, 2],
    ]


@pytest.mark.parametrize("networks", ["proxies", "students"])
def test_the_results_do_not_depend_on_the_number_of_streams(measured: dict[str, Any], networks: str):
    assert measured[networks] == {"same": True, "streams": 3}


def test_every_use_of_memory_is_ordered(measured: dict[str, Any]):
    assert measured["problems"] == []
