"""Calls every Triton launcher as a run does: arguments, specialisation and compilation, but no launch.

Triton checks a launch in ways that the interpreter and a compilation ahead of time do not. For example it compares the
constants of a kernel before each launch. The test runs in a new process, because it replaces Triton's driver.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = '''
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class MockDriver:
    """A GPU with compute capability 9.0 that cannot launch."""
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_active_torch_device(self): return torch.device("cpu")
    def get_device_interface(self): return torch.cuda
    def get_current_stream(self, device=0): return 0

driver.set_active(MockDriver())
launched, guards, run = [], [], JITFunction.run

def compile_only(self, *args, grid, warmup, **options):
    assert guards, f"{self.fn.__name__} is launched without a device guard"
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    assert "ptx" in kernel.asm
    launched.append(self.fn.__name__)

JITFunction.run = compile_only

class Guard:
    """Stands for torch.cuda.device_of."""
    def __init__(self, x): assert isinstance(x, torch.Tensor)
    def __enter__(self): guards.append(1)
    def __exit__(self, *error): guards.pop()

torch.cuda.device_of = Guard
from tadperf.kernels.gpu import (
    differentiable_augment as augment, diverse_pick, mixture, norm_relu_pool, norm_relu_pool_dual,
    per_sample, per_sample_linear, reliability, trajectory_distance, trial
)

labels = torch.zeros(8, dtype=torch.int64)
last = torch.channels_last
for dtype in (torch.float32, torch.bfloat16):
    for _ in range(2):  # the second launch compares the constants with those of the first
        x = torch.randn(8, 5).to(dtype)
        per_sample.per_sample(x, labels)
        per_sample.loss_gradient(x, labels, *torch.randn(3, 8), torch.empty_like(x))
        per_sample_linear.per_sample_linear(torch.randn(8, 4).to(dtype), torch.randn(6, 4).to(dtype), labels, None)
        trajectory_distance.trajectory_distance(*torch.randn(3, 2, 50).to(dtype), [50])
        trajectory_distance.gradient(
            *torch.randn(3, 2, 50).to(dtype), torch.randn(2, 1), torch.randn(2, 1), [50], [True] * 3)
        reliability.reliability(torch.randn(8, 4).to(dtype), torch.randn(3, 4), torch.eye(4))
        pick = torch.randn(4, 3, 5).to(dtype), torch.randn(4, 3), torch.randn(2, 5).to(dtype), labels[:4], labels[:2]
        diverse_pick.diverse_pick(*pick, 2, None)
        maps = torch.randn(2, 4, 6, 6).to(dtype).contiguous(memory_format=last)
        y, moments = norm_relu_pool.norm_relu_pool(maps, torch.ones(4), torch.ones(4), 1e-5, True)
        norm_relu_pool.norm_relu_pool_gradient(y, maps, torch.ones(4), torch.ones(4), moments, True)
        affine, moments = [torch.ones(4)] * 4, torch.empty(4, 2, 4)
        norm_relu_pool_dual.norm_relu_pool_dual((maps, maps), affine, moments, (y, y), 1e-5, True)
        norm_relu_pool_dual.norm_relu_pool_dual_gradient((y, y), (maps, maps), affine, moments, (maps, maps), True)
        for images in (torch.randn(2, 3, 6, 6), maps.float(), torch.randn(2, 1, 1, 1), torch.randn(2, 3, 40, 40)):
            affine, color, hole = torch.randn(2, 2, 3), torch.randn(2, 3), torch.randn(2, 2)
            for parts in ((affine, color, hole), (affine, None, None)):
                augment.differentiable_augment(images.to(dtype), *parts, 3)
                augment.differentiable_augment_adjoint(images.to(dtype), *parts, 3)
    for mixture.ONE_PROGRAM in (30, 0):  # one program for each group, then several
        mixture.mixture(torch.rand(30).to(dtype), torch.zeros(30, dtype=torch.int64), 1, 3, 1e-7, 1e-6, True)
print(*sorted(set(launched)))
'''
KERNELS = {
    "adjoint_kernel",
    "augment_kernel",
    "backward_kernel",
    "block_sums_kernel",
    "dual_backward_kernel",
    "dual_forward_kernel",
    "forward_kernel",
    "gradient_kernel",
    "gram_kernel",
    "join_kernel",
    "linear_kernel",
    "loss_gradient_kernel",
    "merge_kernel",
    "means_kernel",
    "mixture_kernel",
    "pass_kernel",
    "per_sample_kernel",
    "rank_kernel",
    "result_kernel",
    "scan_kernel",
    "segment_sums_kernel",
    "whiten_kernel",
    "write_kernel",
}


def test_every_launcher_compiles_what_it_launches():
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    assert set(result.stdout.split()) == KERNELS
