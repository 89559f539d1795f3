"""ZCA on CUDA: fitted there from one upload of the pixels, in full precision, with the results of a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import RunOnTwin

INPUTS = 3 * 4 * 4
FITTED = INPUTS + 2 * INPUTS**2  # values of the result: the mean, the matrix and its inverse
HISTOGRAMS = 3 * 256


@pytest.fixture(scope="module")
def measured(run_on_twin: RunOnTwin) -> dict[str, Any]:
    return run_on_twin("whitening.py")


@pytest.mark.parametrize(("case", "uploads"), [("resident", 1), ("in chunks", 3)])
def test_pixels_travel_to_the_device_and_do_not_come_back(measured: dict[str, Any], case: str, uploads: int):
    assert measured[case]["uploads of the set"] == uploads
    assert measured[case]["downloaded values"] == FITTED + HISTOGRAMS * (case == "resident")


@pytest.mark.parametrize("case", ["resident", "in chunks"])
def test_results_are_those_of_a_cpu(measured: dict[str, Any], case: str):
    assert measured[case]["error"] < 1e-5
    assert measured[case]["pixels"]


@pytest.mark.parametrize("case", ["resident", "in chunks"])
def test_no_product_uses_tf32(measured: dict[str, Any], case: str):
    assert len(measured[case]["tf32"]) == 5 + 6 + 1  # covariance, whitening, inverse
    assert not any(measured[case]["tf32"])
