"""The Triton kernel of mixture: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import numpy as np
import pytest

from tadperf.kernels import mixture_reference
from tadperf.kernels.gpu import launch_configs

from .test_mixture import assert_agrees, assert_same, early, group_of, late, many_groups, oracle, separate

pytest.importorskip("triton")


@pytest.mark.interpreter
@pytest.mark.parametrize("monotone", [False, True])
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_triton_equals_reference(monotone):
    from tadperf.kernels.gpu.mixture import mixture as triton_mixture

    losses, groups, count = many_groups(2, sizes=(0, 1, 2, 60, 129, 507))
    groups = groups.clone()
    wrong = groups.clone()
    wrong[5::97] = count  # ignored, because an error would mean waiting for the device
    groups[5::97] = -1
    results = triton_mixture(losses, wrong.int(), count, 10_000, 1e-7, 1e-6, monotone)
    assert_same(results, mixture_reference(losses, groups, count, monotone=monotone), atol=1e-6)
    half = triton_mixture(losses.bfloat16(), groups, count, 30, 1e-7, 1e-6, monotone)
    expected = mixture_reference(losses.bfloat16(), groups, count, iterations=30, monotone=monotone)
    assert_same(half, expected, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_groups_in_parts_equal_reference(monkeypatch):
    """Groups of many sizes, also smaller than a part, empty, with equal losses, and with too few steps to converge."""
    from tadperf.kernels.gpu import mixture as module
    from tadperf.kernels.gpu import mixture_parts

    monkeypatch.setattr(module, "ONE_PROGRAM", 0)
    monkeypatch.setattr(mixture_parts, "PART", 30)
    monkeypatch.setattr(mixture_parts, "PASSES", 5)
    losses, groups, count = many_groups(2, sizes=(0, 3, 60, 300))
    losses[groups == 1] = 3.0
    results = module.mixture(losses, groups, count, 10_000, 1e-7, 1e-6, True)
    assert_same(results, mixture_reference(losses, groups, count, monotone=True), atol=1e-6)
    few = module.mixture(losses, groups, count, 9, 1e-7, 1e-6, False)
    expected = mixture_reference(losses, groups, count, iterations=9)
    assert_same(few, expected, atol=1e-6)
    assert few[4].tolist() == expected.iterations.tolist()


@pytest.mark.interpreter
@pytest.mark.parametrize(("make", "in_parts"), [(separate, False), (late, False), (early, True)])
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_triton_equals_sklearn(make, in_parts, monkeypatch):
    """Compares with sklearn's fit in float64, run to convergence."""
    from tadperf.kernels.gpu import mixture as module
    from tadperf.kernels.gpu import mixture_parts

    monkeypatch.setattr(module, "ONE_PROGRAM", 0 if in_parts else 1000)
    monkeypatch.setattr(mixture_parts, "PART", 100)
    losses, groups = group_of(make(np.random.default_rng(0), 300, 0.3))
    wanted, _ = oracle(losses)
    assert_agrees(module.mixture(losses, groups, 1, 10_000, 1e-7, 1e-6, False)[0], wanted)


POINTERS = {"x_ptr": "*fp32", "sample_ptr": "*i64", "begins_ptr": "*i64", "posterior_ptr": "*fp32"}
POINTERS |= dict.fromkeys(("weight_ptr", "mean_ptr", "variance_ptr", "log_likelihood_ptr"), "*fp64")
POINTERS |= {"iterations_ptr": "*i64", "state_ptr": "*fp64", "sums_ptr": "*fp64"}
NUMBERS = {"rounds": "i32", "number": "i32", "monotone": "i32", "tolerance": "fp64", "floor": "fp64", "n_parts": "i32"}


def compiles_without_spills(aot, kernel, constants, warps):
    types = {name: kind for name, kind in (POINTERS | NUMBERS).items() if name in kernel.arg_names}
    for target, resources in aot(kernel, types, constants, num_warps=warps).items():
        # gfx942 keeps some scalars of the float64 exponentials in lanes of vector registers; nothing goes to memory.
        assert resources.spills <= (48 if target == "gfx942" else 0), (target, resources)
        assert resources.shared <= 4096


@pytest.mark.parametrize("entry", launch_configs.shipped("mixture"), ids=str)
def test_triton_compiles_without_spills(aot, entry):
    from tadperf.kernels.gpu.mixture import mixture_kernel

    compiles_without_spills(aot, mixture_kernel, {"BLOCK": entry["BLOCK"]}, entry["num_warps"])


@pytest.mark.parametrize("name", ["pass_kernel", "write_kernel", "result_kernel"])
def test_parts_compile_without_spills(aot, name):
    from tadperf.kernels.gpu import mixture_parts

    kernel, entry = getattr(mixture_parts, name), launch_configs.shipped("mixture_parts")[0]
    values = {"BLOCK": entry["BLOCK"], "PARTS": mixture_parts.PROGRAMS}
    constants = {name: value for name, value in values.items() if name in kernel.arg_names}
    compiles_without_spills(aot, kernel, constants, entry["num_warps"] if "BLOCK" in constants else 4)
