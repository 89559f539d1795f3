"""No unit of work asks more of a CUDA device than its budget. A failure names the lines of tadperf that ask most."""

from __future__ import annotations

from typing import Any

import pytest

from .budgets import BUDGETS, Budget
from .conftest import RunOnTwin

# What counts for each field of a budget, in the words of counters.py.
KINDS = {
    "replays": ("graph replay",),
    "launches": ("launch",),
    "async_copies": ("async copy",),
    "blocking_copies": ("blocking copy to device", "blocking copy to host"),
    "waits": ("wait",),
}


@pytest.fixture(scope="module")
def measured(run_on_twin: RunOnTwin) -> dict[str, Any]:
    return run_on_twin("work_units.py")


@pytest.mark.parametrize("unit", BUDGETS)
def test_a_unit_of_work_keeps_its_budget(measured: dict[str, Any], unit: str):
    needed = needed_by(measured[unit])
    exceeded = [field for field in Budget._fields if getattr(needed, field) > getattr(BUDGETS[unit], field)]
    assert not exceeded, "\n".join(excess(unit, field, needed, measured[unit]) for field in exceeded)


@pytest.mark.parametrize("unit", BUDGETS)
def test_a_unit_of_work_is_a_replay_of_a_graph(measured: dict[str, Any], unit: str):
    assert needed_by(measured[unit]).replays == BUDGETS[unit].replays


def test_an_exceeded_budget_names_its_lines():
    lines = {"launch": {"b.py:2 [add]": 1.0, "a.py:1 [mul]": 3.0}, "wait": {"c.py:3": 1.0}}
    measured = {"nodes": 1, "counts": {"launch": 4.0}, "lines": lines, "node_lines": {}}
    text = excess("proxy step", "launches", needed_by(measured), measured)
    assert text.startswith("proxy step: 4 launches")
    assert text.splitlines()[1:] == ["       3  a.py:1 [mul]", "       1  b.py:2 [add]"]


def needed_by(measured: dict[str, Any]) -> Budget:
    """Returns what one unit needs, in the form of its budget."""
    counts = measured["counts"]
    totals = {field: sum(counts.get(kind, 0) for kind in kinds) for field, kinds in KINDS.items()}
    return Budget(nodes=measured["nodes"], **totals)


def excess(unit: str, field: str, needed: Budget, measured: dict[str, Any]) -> str:
    """Returns a message with the lines that ask most."""
    lines = measured["node_lines"] if field == "nodes" else {}
    for kind in KINDS.get(field, ()):
        lines = lines | measured["lines"].get(kind, {})
    most = sorted(lines.items(), key=lambda item: -item[1])[:20]
    head = f"{unit}: {getattr(needed, field):g} {field}, the budget is {getattr(BUDGETS[unit], field):g}; most of them:"
    return "\n".join([head, *(f"{number:8g}  {line}" for line, number in most)])
