"""Without Triton, CUDA augments in plain PyTorch: in full precision, with the results of a CPU."""

from __future__ import annotations

from .conftest import RunOnTwin


def test_no_matrix_product_that_tf32_could_round(run_on_twin: RunOnTwin):
    measured = run_on_twin("plain_augment.py")
    assert measured["launches"] > 10
    assert not measured["products"]
    assert all(error < 1e-5 for error in measured["errors"])
