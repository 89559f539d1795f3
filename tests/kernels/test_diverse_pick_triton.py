"""The Triton kernel of diverse_pick: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tadperf.kernels import diverse_pick_reference
from tadperf.kernels.gpu import launch_configs

from .test_diverse_pick import random_case, truth

pytest.importorskip("triton")
INF, NAN = float("inf"), float("nan")
AXES = torch.eye(4)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("top_k", "weight"), [(None, None), (2, None), (None, 0.5), (3, 2.0)])
@pytest.mark.parametrize("shape", [(1, 1, 3, 0), (7, 5, 20, 40), (6, 17, 129, 3)])
def test_triton(dtype, top_k, weight, shape):
    from tadperf.kernels.gpu import diverse_pick as triton_kernels

    anomalies, choices, size, held = shape
    case = random_case(anomalies, choices, size, held, 2, dtype=dtype)
    index, similarity, gap = truth(*case, top_k, weight)
    assert gap > 1e-5
    results = triton_kernels.diverse_pick(*case, top_k, weight)
    assert results[0].tolist() == index.tolist()
    np.testing.assert_allclose(results[1].numpy(), similarity, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", ["joining", "excluded", "equal", "pool"])
def test_triton_on_hard_values(case):
    from tadperf.kernels.gpu import diverse_pick as triton_kernels

    candidates, scores, held = AXES.repeat(5, 1, 1), torch.ones(5, 4), AXES[[0, 0]].clone()
    classes, top_k = torch.tensor([5, -3, 5, 5, -3]), 2 if case == "pool" else None
    if case == "excluded":
        scores[0, :2], scores[1] = torch.tensor([NAN, -INF]), -INF
        candidates[2, 1, 2], candidates[3], held[1, 2] = NAN, INF, NAN
        scores[4, 1] = INF
    elif case == "equal":
        candidates[:] = AXES[1]
    arguments = candidates, scores, held, classes, torch.tensor([5, 5])
    with np.errstate(all="ignore"):
        index, similarity = triton_kernels.diverse_pick(*arguments, top_k, None)
    expected = diverse_pick_reference(*arguments, top_k=top_k)
    assert index.tolist() == expected.index.tolist()
    np.testing.assert_array_equal(similarity, expected.similarity)


@pytest.mark.interpreter
@pytest.mark.parametrize(("places", "candidates"), [(1, 4), (2, 2), (3, 64), (32, 64)])
@pytest.mark.parametrize("options", [(None, None), (3, None), (None, 0.5)])
def test_panels_and_chunks_do_not_change_the_winners(places, candidates, options):
    """Compares with float64: classes of 1 to 23 anomalies, so panels are full, partly filled or empty."""
    from tadperf.kernels.gpu import diverse_pick as triton_kernels

    case = random_case(40, 7, 30, 20, 3)
    case[3][:23] = 1
    case[3][39] = 9  # a class without a qualified image and with one anomaly
    index, similarity, gap = truth(*case, *options)
    assert gap > 1e-5
    with launch_configs.override(lambda _, __, entry: {**entry, "places": places, "candidates": candidates}):
        results = triton_kernels.diverse_pick(*case, *options)
    assert results[0].tolist() == index.tolist()
    np.testing.assert_allclose(results[1].numpy(), similarity, atol=1e-6)


def test_panel_size(monkeypatch):
    from tadperf.kernels.gpu import diverse_pick as triton_kernels

    assert triton_kernels.panel_size(50, 100, 10, 32) == 32
    assert triton_kernels.panel_size(5, 100, 10, 32) == 5
    monkeypatch.setattr(triton_kernels, "GRAM", 100 * 70**2)
    assert triton_kernels.panel_size(50, 100, 10, 32) == 7
    assert triton_kernels.panel_size(50, 100, 1000, 32) == 1


FLOATS = dict.fromkeys(("units_ptr", "others_ptr", "gram_ptr", "largest_ptr", "similarity_ptr"), "*fp32")
LONGS = dict.fromkeys(
    ("order_ptr", "begins_ptr", "ends_ptr", "table_ptr", "other_begins_ptr", "other_ends_ptr"), "*i64"
)
LONGS |= dict.fromkeys(("rows_ptr", "index_ptr"), "*i64")
OTHERS = {"pooled_ptr": "*i8", "scores_ptr": "*fp64", "weight_ptr": "*fp64"}
SIZES = ("first_place", "first_other", "n_others", "n_places", "n_candidates", "n_features")
TYPES = FLOATS | LONGS | OTHERS | dict.fromkeys(SIZES, "i32")


@pytest.mark.parametrize("entry", launch_configs.shipped("diverse_pick"))
@pytest.mark.parametrize("name", ["join_kernel", "gram_kernel", "scan_kernel"])
def test_triton_compiles_without_spills(aot, entry, name):
    from tadperf.kernels.gpu import diverse_pick as triton_kernels

    kernel = getattr(triton_kernels, name)
    signature = {argument: TYPES[argument] for argument in kernel.arg_names if argument in TYPES}
    for backend, precision in (("cuda", "tf32x3"), ("hip", "ieee")):
        constants = {key.upper(): value for key, value in entry.items()} | {"PRECISION": precision}
        constexprs = {argument: constants[argument] for argument in kernel.arg_names if argument not in TYPES}
        options = {"num_warps": entry["num_warps"]}
        if name != "scan_kernel":
            options["num_stages"] = entry["num_stages"]
        found = aot(kernel, signature, constexprs, backend=backend, **options)
        assert {target: usage.spills for target, usage in found.items() if usage.spills} == {}
