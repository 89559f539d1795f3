"""The Triton kernels of reliability: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import pytest
import torch

from tadperf.kernels import reliability, reliability_reference
from tadperf.kernels.gpu import launch_configs

from .test_reliability import errors, random_case

pytest.importorskip("triton")
INF, NAN = float("inf"), float("nan")
SHAPES = [(0, 3, 2), (1, 1, 1), (3, 2, 2), (7, 3, 127), (33, 7, 12), (65, 129, 13), (30, 130, 140)]


@pytest.mark.interpreter
@pytest.mark.parametrize(("rows", "width", "classes"), SHAPES)
def test_triton_against_scipy(rows, width, classes):
    from tadperf.kernels.gpu.reliability import reliability as triton_reliability

    case = random_case(rows, width, classes)
    result = triton_reliability(*case)
    if rows and classes > 1:
        assert errors(result, *case) < 1e-5
    else:
        expected = reliability_reference(*case)
        assert all(torch.equal(a, b) for a, b in zip(result[::2], expected[::2], strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_equals_the_reference(dtype):
    """In blocks of rows, with strides, hard values, and anchors that are equal, of length 0 and not finite."""
    from tadperf.kernels.gpu import reliability as module

    features, anchors, cholesky = random_case(100, 19, 20)
    features[3], features[5, 2], features[6, 3], features[7, 4] = 0, NAN, INF, -INF
    features = features.to(dtype).mT.contiguous().mT
    anchors, cholesky = anchors.mT.contiguous().mT, cholesky.mT.contiguous().mT
    anchors[6], anchors[8, 1], anchors[9, 0] = 0, NAN, INF
    module.BLOCK, whole = 40 * 19, module.BLOCK
    result = module.reliability(features, anchors, cholesky)
    module.BLOCK = whole
    expected = reliability_reference(features, anchors, cholesky)
    for ours, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, wanted, atol=2e-6, rtol=2e-6, equal_nan=True)
    equal = torch.cat([torch.eye(5, 19), -torch.eye(5, 19)]).repeat(
        4, 1
    )  # sums of one term, because NumPy also rounds equal columns differently
    ties, wanted = (f(features, equal, torch.eye(19)) for f in (module.reliability, reliability))
    assert all(torch.equal(a, b) for a, b in zip(ties[::2], wanted[::2], strict=True))
    alone = module.reliability(features, anchors[:1], cholesky)
    assert (alone.second == -1).all()
    assert alone.second_similarity.isnan().all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_triton_compiles_without_spills(aot, dtype):
    from tadperf.kernels.gpu.reliability import rank_kernel, whiten_kernel

    def no_spills(kernel, signature, entry, **constexprs):
        constexprs |= {key: value for key, value in entry.items() if key.isupper()}
        options = {key: entry[key] for key in ("num_warps", "num_stages")}
        for backend, precision in (("cuda", "tf32x3"), ("hip", "ieee")):
            found = aot(kernel, signature, {**constexprs, "PRECISION": precision}, backend=backend, **options)
            assert not any(resources.spills for resources in found.values()), (kernel, constexprs, found)

    sizes = {"n_rows": "i64", "n_features": "i32", "row_stride": "i64", "column_stride": "i64"}
    for entry in launch_configs.shipped("reliability_whiten"):
        signature = {
            "features_ptr": f"*{dtype}",
            "centre_ptr": "*fp32",
            "inverse_ptr": "*fp32",
            "out_ptr": "*fp32",
        } | sizes
        no_spills(whiten_kernel, signature, entry)
    signature = {
        "samples_ptr": f"*{dtype}",
        "anchors_ptr": "*fp32",
        "offsets_ptr": "*fp32",
        "first_ptr": "*i64",
    } | sizes
    signature |= {"first_value_ptr": "*fp32", "second_ptr": "*i64", "second_value_ptr": "*fp32", "n_classes": "i32"}
    for entry in launch_configs.shipped("reliability"):
        for distance in (False, True) if dtype == "fp32" else (False,):  # whitened features are always float32
            no_spills(rank_kernel, signature, entry, DISTANCE=distance)
