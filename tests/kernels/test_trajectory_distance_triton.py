"""The Triton kernels of trajectory_distance: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tadperf.kernels import trajectory_distance_reference
from tadperf.kernels.gpu import launch_configs
from tadperf.kernels.ops.trajectory_distance import _gradient


def random_case(rows, size, dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    student, target, start = (torch.randn(rows, size, generator=random).to(dtype) for _ in range(3))
    return student, target, start


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "lengths"), [(1, [1]), (3, [7]), (2, [4096]), (3, [129, 0, 4097, 3]), (2, [0]), (1, [9000])]
)
def test_triton_distance(dtype, rows, lengths):
    from tadperf.kernels.gpu import trajectory_distance as triton_kernels

    student, target, start = random_case(rows, sum(lengths), dtype=dtype)
    target, start = target[:1], start.to(torch.float32)
    with np.errstate(all="ignore"):
        results = triton_kernels.trajectory_distance(student, target, start, lengths)
    assert [(r.dtype, r.shape) for r in results] == [(torch.float32, (rows, len(lengths)))] * 3
    expected = trajectory_distance_reference(student.double(), target.double(), start.double(), lengths)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=2e-6, atol=0, equal_nan=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
@pytest.mark.parametrize("alone", [(0, 0, 0), (0, 1, 0), (1, 1, 0)])
def test_triton_gradient(dtype, needs, alone):
    from tadperf.kernels.gpu import trajectory_distance as triton_kernels

    lengths = [130, 0, 2100]
    whole = random_case(3, sum(lengths), dtype=dtype)
    s, t, u = inputs = [x[:1] if one else x for x, one in zip(whole, alone, strict=True)]
    factors = torch.randn(3, 3), torch.randn(3, 3)
    grads = triton_kernels.gradient(s, t, u, *factors, lengths, [bool(need) for need in needs])
    expected = _gradient(*inputs, *factors, lengths, [True] * 3)
    for grad, wanted, x, need in zip(grads, expected, inputs, needs, strict=True):
        assert grad.dtype == dtype
        if not need:
            assert grad.numel() == 0
            continue
        assert grad.shape == x.shape
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(grad.float(), wanted.float(), rtol=tolerance, atol=tolerance)


ELEMENTS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("entry", launch_configs.shipped("trajectory_distance"))
def test_triton_compiles_without_spills(aot, dtype, entry):
    from tadperf.kernels.gpu import trajectory_distance as triton_kernels

    x = ELEMENTS[dtype]
    inputs = dict.fromkeys(("student_ptr", "target_ptr", "start_ptr"), x)
    numbers = dict.fromkeys(("student_stride", "target_stride", "start_stride"), "i64") | {"n_blocks": "i32"}
    found = aot(
        triton_kernels.block_sums_kernel,
        inputs | {"blocks_ptr": "*i64", "sums_ptr": "*fp32"} | numbers,
        {"BLOCK": entry["block"]},
        num_warps=entry["num_warps"],
    )
    pointers = dict.fromkeys(("of_distance_ptr", "of_expert_ptr"), "*fp32") | dict.fromkeys(
        ("grad_student_ptr", "grad_target_ptr", "grad_start_ptr"), x
    )
    for code in (1, 2):
        found |= {
            f"{name} gradient {code}": usage
            for name, usage in aot(
                triton_kernels.gradient_kernel,
                inputs | pointers | {"blocks_ptr": "*i64", "n_segments": "i32", "n_rows": "i32"} | numbers,
                {"NEED_S": code, "NEED_T": code, "NEED_U": code, "BLOCK": entry["gradient_block"]},
                num_warps=entry["num_warps"],
            ).items()
        }
    if dtype == torch.float32:
        results = dict.fromkeys(("sums_ptr", "distance_ptr", "expert_distance_ptr", "ratio_ptr"), "*fp32")
        numbers = {"firsts_ptr": "*i64", "n_blocks": "i32", "n_segments": "i32"}
        fold = aot(triton_kernels.segment_sums_kernel, results | numbers, {"FOLD": entry["fold"]}, num_warps=1)
        found |= {f"{name} fold": usage for name, usage in fold.items()}
    assert {name: usage.spills for name, usage in found.items() if usage.spills} == {}
