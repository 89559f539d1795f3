"""The Triton kernels of per_sample_linear: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import pytest
import torch

from tadperf.kernels import per_sample_linear_reference, per_sample_reference
from tadperf.kernels.gpu.launch_configs import shipped

pytest.importorskip("triton")
INF, NAN = float("inf"), float("nan")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def assert_close(results, expected, tolerance=5e-6):
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("rows", "classes", "depth"), [(0, 3, 2), (1, 2, 1), (70, 129, 33), (3, 507, 70), (2, 3000, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter's dot reads bfloat16 as integers
@pytest.mark.parametrize("with_bias", [False, True])
def test_per_sample_linear(rows, classes, depth, dtype, with_bias):
    """Also if several programs share the classes of a row, and with operands of any stride."""
    from tadperf.kernels.gpu.per_sample_linear import per_sample_linear

    labels = torch.randint(-1, classes, (rows,), generator=torch.Generator().manual_seed(rows + classes))
    features, weight = torch.randn(depth, rows).t().to(dtype), torch.randn(classes, 2 * depth)[:, ::2].to(dtype)
    bias = torch.randn(classes, 2)[:, 0].to(dtype) if with_bias else None
    *results, top = per_sample_linear(features, weight, labels, bias)
    assert_close(results, per_sample_linear_reference(features, weight, labels, bias), 2e-5)
    logits = features.float() @ weight.float().t() + (0 if bias is None else bias.float())
    torch.testing.assert_close(top, logits.amax(1), atol=1e-5, rtol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("labels", [[250, 3, 7, 299], [-1, -1, -1, -1]])
def test_per_sample_linear_hard_values(labels):
    """Ties between programs, classes of probability 0 (a bias of -inf) and undefined rows, as with stored logits."""
    from tadperf.kernels.gpu.per_sample_linear import per_sample_linear

    def check(features, weight, bias):
        *results, _ = per_sample_linear(features, weight, torch.tensor(labels), bias)
        assert_close(results, per_sample_reference(features @ weight.t() + bias, torch.tensor(labels)))

    features, weight, bias = torch.eye(4), torch.zeros(300, 4), torch.zeros(300)
    weight[[100, 250], 0] = 1
    weight[:, 1] = -3e38
    weight[3, 1] = 3e38
    check(features, weight, bias)
    bias[:200] = -INF
    check(features, weight, bias)
    weight[:, 2] = INF
    weight[200, 3] = NAN
    check(features, weight, bias)
    check(features, torch.zeros(300, 4), torch.full((300,), -INF))


KERNEL_RESULTS = {
    "loss_ptr": "*fp32",
    "confidence_ptr": "*fp32",
    "prediction_ptr": "*i64",
    "margin_ptr": "*fp32",
    "entropy_ptr": "*fp32",
}


def no_spills(found):
    assert len(found) == 4
    assert {name: r.spills for name, r in found.items()} == dict.fromkeys(found, 0), found


@pytest.mark.parametrize("name", TYPES)
def test_per_sample_linear_compiles_without_spills(aot, name):
    """Uses the launch entry of this type. The shared memory must fit into that of the smaller GPUs."""
    from tadperf.kernels.gpu.per_sample_linear import linear_kernel

    size = TYPES[name].itemsize
    how = next(entry for entry in shipped("per_sample_linear") if entry["up_to"] is None or size <= entry["up_to"])
    signature = {
        "features_ptr": f"*{name}",
        "weight_ptr": f"*{name}",
        "bias_ptr": f"*{name}",
        "labels_ptr": "*i64",
        "state_ptr": "*fp32",
    }
    signature |= dict.fromkeys(["n_rows", "n_classes", "n_features", "feature_stride", "weight_stride"], "i32")
    signature |= {"label_stride": "i32", "per_split": "i32"}
    constants = {
        "HAS_BIAS": True,
        "ROWS": how["rows"],
        "BLOCK": how["block"],
        "DEPTH": how["depth"],
    }
    options = {key: how[key] for key in ("num_warps", "num_stages")}
    found = {}
    for backend, precision in (("cuda", "tf32x3"), ("hip", "ieee")):
        found |= aot(linear_kernel, signature, {**constants, "PRECISION": precision}, backend=backend, **options)
    no_spills(found)
    assert found["sm_80"].shared <= 163 * 1024
    assert found["gfx942"].shared <= 64 * 1024


def test_merge_compiles_without_spills(aot):
    from tadperf.kernels.gpu.per_sample_linear import MAX_SPLITS, merge_kernel

    signature = {"state_ptr": "*fp32", "labels_ptr": "*i64", **KERNEL_RESULTS, "tops_ptr": "*fp32"}
    signature |= {"n_rows": "i32", "n_classes": "i32", "label_stride": "i32", "n_splits": "i32"}
    no_spills(aot(merge_kernel, signature, {"ROWS": 512 // MAX_SPLITS, "SPLITS": MAX_SPLITS}, num_warps=4))
