"""The tool that prints the resources of compiled kernels, and the figures that the kernels must keep."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tadperf.bench.tools.kernel_resources import occupancy, widths

SASS = """
LDG.E.128.CONSTANT R4, [R2.64] ;   LDG.E R4, [R2.64] ;   LDG.E.U16 R4, [R2.64] ;   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
LDG.E.64 R4, [R2.64] ;   STG.E.64 [R2.64], R4 ;   LDGDEPBAR ;   STG.E desc[UR4][R2.64], R4 ;   LDS.128 R4, [R2] ;
"""


def test_counts_instructions_by_width():
    assert widths(SASS, "LDG") == {128: 2, 64: 1, 32: 1, 16: 1}
    assert widths(SASS, "STG") == {64: 1, 32: 1}


def test_occupancy_is_that_of_nvidias_table():
    assert occupancy(32, 0, 4, 90) == 1.0
    assert occupancy(40, 0, 4, 90) == 0.75
    assert occupancy(255, 0, 8, 90) == 0.125
    assert occupancy(32, 100 * 1024, 8, 90) == 0.25
    assert occupancy(16, 0, 1, 90) == 0.5  # at most 32 programs


def rows(operator: str, sm: int = 90) -> list[dict[str, str]]:
    """Returns the table of an operator, from a new process: the tool replaces Triton's driver."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tadperf.bench.tools.kernel_resources", operator, "--sm", str(sm)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_per_sample_keeps_its_rows_in_registers():
    """With any Triton version the threads of a row are in one warp: no value goes through shared memory."""
    table = {row["case"]: row for row in rows("per_sample")}
    for case in ("C 10 float32", "C 100 float32", "C 1000 float32", "C 1000 bfloat16"):
        assert int(table[case]["registers"]) <= 64
        assert table[case]["spills"] == "0"
        assert table[case]["shared"] == "0"
    assert table["C 100 float32 gradient"]["stores"] == "2 of 128"


def test_norm_relu_pool_dual_spills_nothing_on_sm_100():
    """Also bfloat16 maps of 32 x 32 without pool, which need the most registers of all cases."""
    table = rows("norm_relu_pool_dual", 100)
    assert "32 x 32 bfloat16, no pool reverse" in {row["case"] for row in table}
    assert {row["case"]: row["spills"] for row in table} == dict.fromkeys((row["case"] for row in table), "0")
