"""Builds one small Triton kernel and its launcher, which needs a C compiler."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def trial_kernel(out_ptr):
    """Writes 1 to one element."""
    tl.store(out_ptr, 1.0)


def build() -> None:
    """Compiles the kernel and its launcher for the current device, without a launch. Raises an error if that fails."""
    compiled = trial_kernel.warmup(torch.float32, grid=(1,))
    if compiled is not None:  # the interpreter compiles nothing
        compiled._init_handles()
