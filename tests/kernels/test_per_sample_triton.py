"""The Triton kernels of per_sample: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import pytest
import torch

from tadperf.kernels import per_sample_reference
from tadperf.kernels.gpu.launch_configs import shipped

pytest.importorskip("triton")
INF, NAN = float("inf"), float("nan")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def random_case(rows, classes, dtype=torch.float32, label_dtype=torch.int64):
    random = torch.Generator().manual_seed(rows + classes)
    logits = (torch.randn(rows, classes, generator=random) * 3).to(dtype)
    return logits, torch.randint(-1, classes, (rows,), generator=random, dtype=label_dtype)


def assert_close(results, expected, tolerance=5e-6):
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("rows", "classes"), [(0, 3), (1, 2), (3, 7), (2, 127), (3, 129), (2, 507), (300, 5), (2, 5000)]
)
@pytest.mark.parametrize("dtype", TYPES.values())
def test_per_sample(rows, classes, dtype):
    from tadperf.kernels.gpu.per_sample import per_sample

    logits, labels = random_case(rows, classes, dtype, torch.int32)
    assert_close(per_sample(logits, labels), per_sample_reference(logits, labels))


HARD = [
    [0, 0, 0],
    [1, -INF, 1],
    [-INF, 5, -INF],
    [-INF, -INF, -INF],
    [INF, 0, 0],
    [0, NAN, 0],
    [0, 0, NAN],
    [NAN, NAN, NAN],
    [3e38, -3e38, 0],
    [2, 5, 5],
    [-1000, 0, 0],
    [INF, INF, 0],
    [INF, -INF, NAN],
]


@pytest.mark.interpreter
@pytest.mark.parametrize("width", [3, 40, 2100, 4500])
@pytest.mark.parametrize("spread", [False, True])
def test_per_sample_hard_values(width, spread):
    """The logits are adjacent or each in its own chunk, among classes of probability 0."""
    from tadperf.kernels.gpu.per_sample import per_sample

    logits = torch.full((len(HARD), width), -INF)
    at = torch.tensor([0, (width - 1) // 2, width - 1]) if spread else torch.arange(3) + (width - 3) // 2
    logits[:, at] = torch.tensor(HARD)
    for label in (at[0], at[1], torch.tensor(-1)):
        labels = label.expand(len(HARD))
        assert_close(per_sample(logits, labels), per_sample_reference(logits, labels))


@pytest.mark.interpreter
@pytest.mark.parametrize("classes", [10, 12, 100, 1000, 1004])
@pytest.mark.parametrize("dtype", TYPES.values())
def test_per_sample_with_vector_loads(classes, dtype):
    """Rows of many alignments: adjacent, columns of a wider table, from an odd address. Compared with float64."""
    from tadperf.kernels.gpu.per_sample import loss_gradient, per_sample

    wide, labels = random_case(37, classes + 8, dtype)
    labels = labels % classes
    for logits in (wide[:, :classes].contiguous(), wide[:, :classes], wide[:, 1 : classes + 1]):
        results = per_sample(logits, labels)
        expected = per_sample_reference(logits.double(), labels)
        assert_close(results, [x if x.dtype == torch.int64 else x.float() for x in expected])
        top, scale = logits.float().amax(1), torch.ones(37)
        found = loss_gradient(logits, labels, top, results.confidence, scale, torch.empty(37, classes, dtype=dtype))
        wanted = logits.double().softmax(1) - torch.nn.functional.one_hot(labels, classes)
        torch.testing.assert_close(found, wanted.to(dtype), atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 1e-2)


def test_vector_size():
    """The vector size divides the number of columns, the stride and the address, and is at most 16 bytes."""
    from tadperf.kernels.gpu.per_sample import vector_size

    wide = torch.zeros(3, 1016)
    assert [vector_size(torch.zeros(3, c)) for c in (10, 7, 100, 1000)] == [2, 1, 4, 4]
    assert [vector_size(torch.zeros(3, c, dtype=torch.bfloat16)) for c in (10, 100, 1000)] == [2, 4, 8]
    assert [vector_size(wide[:, a:b]) for a, b in ((0, 1000), (4, 14), (1, 1001), (8, 1000))] == [4, 2, 1, 4]
    assert vector_size(torch.zeros(3, 1018)[:, :1000]) == 2
    assert vector_size(wide.t()) == 1
    assert vector_size(wide[:, ::2]) == 1


@pytest.mark.interpreter
def test_per_sample_strides_and_labels_out_of_range():
    from tadperf.kernels.gpu.per_sample import per_sample

    logits, labels = random_case(40, 30)
    strided, every_second = logits.t().contiguous().t()[:, ::3], (labels % 10).repeat_interleave(2)[::2]
    assert_close(per_sample(strided, every_second), per_sample_reference(strided, every_second))
    loss = per_sample(logits, torch.arange(40) - 5).loss
    assert loss.isnan().tolist() == [label < -1 or label >= 30 for label in range(-5, 35)]


@pytest.mark.interpreter
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (5, 129), (2, 2500)])
@pytest.mark.parametrize("dtype", TYPES.values())
def test_gradient(rows, classes, dtype):
    from tadperf.kernels.gpu.per_sample import loss_gradient

    logits, labels = random_case(rows, classes, dtype)
    exact = logits.double().requires_grad_()
    results = per_sample_reference(exact, labels)
    scale = torch.linspace(-1, 2, rows)
    (results.loss * scale).sum().backward()
    assert exact.grad is not None
    top, confidence = logits.float().amax(1), results.confidence.detach().float()
    out = loss_gradient(logits, labels, top, confidence, scale, torch.empty_like(logits))
    torch.testing.assert_close(out, exact.grad.to(dtype), atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 1e-2)
    middle = (classes + 1) // 2
    for part, first in ((logits[:, :middle], 0), (logits[:, middle:], middle)):
        found = torch.empty(part.shape, dtype=dtype)
        loss_gradient(part, labels, top, confidence, scale, found, first, classes)
        assert torch.equal(found, out[:, first : first + part.shape[1]])


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
@pytest.mark.parametrize("how", shipped("per_sample"), ids=str)
@pytest.mark.parametrize("chunks", ["one", "many"])
def test_per_sample_compiles_without_spills(aot, name, how, chunks):
    from tadperf.kernels.gpu.per_sample import per_sample_kernel

    signature = {"logits_ptr": f"*{name}", "labels_ptr": "*i64", **KERNEL_RESULTS}
    sizes = ["n_rows", "n_classes", "row_stride", "class_stride", "label_stride"]
    signature |= dict.fromkeys(sizes, "i32")
    constants = {"ROWS": how["num_warps"], "STEPS": how["values"], "LANES": 32}
    no_spills(aot(per_sample_kernel, signature, constants | {"ONE_CHUNK": chunks == "one"}, num_warps=how["num_warps"]))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("how", shipped("per_sample_gradient"), ids=str)
def test_gradient_compiles_without_spills(aot, name, how):
    from tadperf.kernels.gpu.per_sample import loss_gradient_kernel

    signature = {
        "logits_ptr": f"*{name}",
        "labels_ptr": "*i64",
        "top_ptr": "*fp32",
        "confidence_ptr": "*fp32",
        "scale_ptr": "*fp32",
    }
    signature |= {"out_ptr": f"*{name}", "n_rows": "i32", "column_vectors": "i32", "first": "i32", "n_classes": "i32"}
    signature |= {"row_vectors": "i32", "class_stride": "i32", "label_stride": "i32"}
    constants = {"ROWS": how["tile"] // how["block"], "BLOCK": how["block"], "VECTOR": 1}
    no_spills(aot(loss_gradient_kernel, signature, constants, num_warps=how["num_warps"]))
