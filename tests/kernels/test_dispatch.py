"""The operators count their calls by implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tadperf.kernels import conv3x3, gpu, mixture, native, per_sample, per_sample_linear, reliability
from tadperf.kernels.dispatch import add_call_counts, call_counts

COMPILED = "native" if native.available() else "reference"


def calls_of(run) -> dict[tuple[str, str], int]:
    before = call_counts()
    run()
    return dict(call_counts() - before)


def test_a_call_is_counted_under_the_code_that_ran():
    logits, labels = torch.randn(4, 3), torch.arange(4) % 3
    assert calls_of(lambda: per_sample(logits, labels)) == {("per_sample", COMPILED): 1}
    assert calls_of(lambda: per_sample(logits.double(), labels)) == {("per_sample", "reference"): 1}
    assert calls_of(lambda: mixture(torch.rand(9), torch.zeros(9, dtype=torch.long), 1)) == {("mixture", COMPILED): 1}
    anchors, factor = torch.randn(2, 3), torch.eye(3)
    assert calls_of(lambda: reliability(logits, anchors, factor)) == {("reliability", COMPILED): 1}
    maps, kernel = torch.randn(1, 32, 4, 4), torch.randn(32, 32, 3, 3)
    assert calls_of(lambda: conv3x3(maps, kernel)) == {("conv3x3", COMPILED): 1}
    assert calls_of(lambda: conv3x3(maps[:, :3], kernel[:, :3])) == {("conv3x3", "reference"): 1}


def test_a_gradient_is_counted_apart():
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.arange(4) % 3
    found = calls_of(lambda: per_sample(logits, labels).loss.sum().backward())
    assert found == {("per_sample", COMPILED): 1, ("per_sample_gradient", COMPILED): 1}


def test_an_operator_that_uses_the_code_of_another_counts_once():
    features, weight, labels = torch.randn(4, 5), torch.randn(3, 5), torch.arange(4) % 3
    assert calls_of(lambda: per_sample_linear(features, weight, labels)) == {("per_sample_linear", COMPILED): 1}


def test_a_function_transform_runs_the_reference():
    labels = torch.arange(4) % 3
    found = calls_of(lambda: torch.func.grad(lambda x: per_sample(x, labels).loss.sum())(torch.randn(4, 3)))
    assert found == {("per_sample", "reference"): 1}


def test_counts_of_another_process_are_added():
    assert calls_of(lambda: add_call_counts({("mixture", "triton"): 3})) == {("mixture", "triton"): 3}


def test_counting_does_not_make_a_compiler_compile_again():
    counter = CompileCounter()
    kernel = torch.randn(8, 3, 3, 3)

    @torch.compile(backend=counter)
    def run(x: Tensor) -> Tensor:
        return conv3x3(x, kernel) + per_sample(x[0, 0].detach(), torch.tensor([0, 1, 2, 3])).loss.sum()

    for _ in range(3):
        run(torch.randn(1, 3, 4, 4))
        conv3x3(torch.randn(1, 3, 4, 4), kernel)
    assert counter.frame_count == 1


@pytest.mark.skipif(not (torch.cuda.is_available() and gpu.available()), reason="needs CUDA and Triton")
def test_a_call_on_cuda_is_counted_as_triton():
    logits, labels = torch.randn(4, 3, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
    assert calls_of(lambda: per_sample(logits, labels)) == {("per_sample", "triton"): 1}
