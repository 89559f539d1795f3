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


@pytest.mark.parametrize("entry", launch_configs.shipped("diverse_pick"))
def test_triton_compiles_without_spills(aot, entry):
    from tadperf.kernels.gpu import diverse_pick as triton_kernels

    floats = dict.fromkeys(("units_ptr", "qualified_ptr", "similarity_ptr"), "*fp32")
    longs = dict.fromkeys(("order_ptr", "classes_ptr", "begins_ptr", "ends_ptr", "rows_ptr", "index_ptr"), "*i64")
    flags = {"pooled_ptr": "*i8", "usable_ptr": "*i8", "scores_ptr": "*fp64", "weight_ptr": "*fp64"}
    numbers = dict.fromkeys(("n_anomalies", "n_candidates", "n_features"), "i32")
    constexprs = {"ROWS": entry["rows"], "OTHERS": entry["others"], "DEPTH": entry["depth"]}
    found = aot(
        triton_kernels.diverse_pick_kernel,
        floats | longs | flags | numbers,
        constexprs,
        num_warps=entry["num_warps"],
        num_stages=1,
    )
    assert {name: usage.spills for name, usage in found.items() if usage.spills} == {}
