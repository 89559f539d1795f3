"""PyTorch's process-wide settings, set for a block and restored after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

# The switches of matrix products on CUDA, of cuDNN, and of oneDNN on the CPU. PyTorch does not declare their types.
MATMUL: Any = torch.backends.cuda.matmul
CUDNN: Any = torch.backends.cudnn
MKLDNN: Any = torch.backends.mkldnn


@contextlib.contextmanager
def torch_settings(
    *, threads: int | None = None, tf32: bool | None = None, benchmark: bool | None = None
) -> Iterator[None]:
    """Sets PyTorch's settings inside the block, and restores them after it (tadperf).

    threads: CPU threads of PyTorch's operators; None keeps the number.
    tf32: whether float32 matrix products and convolutions on CUDA may use TensorFloat-32 (10 bits of mantissa). The
    default of PyTorch is yes for convolutions and no for matrix products. None keeps all switches.
    benchmark: whether cuDNN tries several algorithms at the first convolution of each shape, and keeps the fastest one.
    A recorded CUDA graph then uses it. Two processes may choose differently, and give other last bits. None keeps it.
    """
    threads_before = torch.get_num_threads()
    restore_tf32 = _tf32_restorer() if tf32 is not None else None
    benchmark_before = CUDNN.benchmark
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if tf32 is not None:
            _set_tf32(tf32)
        if benchmark is not None:
            CUDNN.benchmark = benchmark
        yield
    finally:
        if benchmark is not None:
            CUDNN.benchmark = benchmark_before
        if torch.get_num_threads() != threads_before:
            torch.set_num_threads(threads_before)
        if restore_tf32 is not None:
            restore_tf32()


def _set_tf32(allowed: bool) -> None:
    MATMUL.allow_tf32 = CUDNN.allow_tf32 = allowed
    for operator in (CUDNN.conv, CUDNN.rnn):
        operator.fp32_precision = "tf32" if allowed else "ieee"  # else it may follow torch.backends.fp32_precision


def _tf32_restorer() -> Callable[[], None]:
    """Returns a function that sets all TF32 switches back to their current values.

    PyTorch has two sets of switches: `allow_tf32` and, since 2.9, `fp32_precision`. Writing an old one writes the new
    one too, but not the other way round. Reading an old one raises RuntimeError when the two disagree.
    """
    switches = (MATMUL, CUDNN.conv, CUDNN.rnn, MKLDNN.matmul)
    precisions = [switch.fp32_precision for switch in switches]
    try:
        name = torch.get_float32_matmul_precision()
    except RuntimeError:  # the two disagree, so the old switch is the opposite of the new one
        name = "highest" if precisions[0] == "tf32" else "high"
    try:
        convolutions = CUDNN.allow_tf32
    except RuntimeError:
        convolutions = precisions[1] != "tf32"

    def restore() -> None:
        torch.set_float32_matmul_precision(name)  # the old switch has three values, allow_tf32 only two
        CUDNN.allow_tf32 = convolutions
        for switch, precision in zip(switches, precisions, strict=True):
            switch.fp32_precision = precision

    return restore
