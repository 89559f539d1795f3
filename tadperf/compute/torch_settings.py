"""PyTorch's process-wide settings, set for a block and restored after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def torch_settings(*, threads: int | None = None, tf32: bool | None = None) -> Iterator[None]:
    """Sets the number of CPU threads and the TF32 switches inside the block, and restores both after it (tadperf).

    threads: CPU threads of PyTorch's operators; None keeps the number.
    tf32: whether float32 products and convolutions on CUDA may use TensorFloat-32, which keeps 10 bits of the mantissa.
    PyTorch's own default is yes for convolutions and no for products. None keeps all switches.
    """
    threads_before = torch.get_num_threads()
    restore_tf32 = _tf32_restorer() if tf32 is not None else None
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if tf32 is not None:
            _set_tf32(tf32)
        yield
    finally:
        if torch.get_num_threads() != threads_before:
            torch.set_num_threads(threads_before)
        if restore_tf32 is not None:
            restore_tf32()


def _set_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    for operator in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):  # pyright: ignore[reportAttributeAccessIssue]
        operator.fp32_precision = "tf32" if allowed else "ieee"  # else it may follow torch.backends.fp32_precision


def _tf32_restorer() -> Callable[[], None]:
    """Returns a function that puts all TF32 switches back to their present values.

    PyTorch has two sets of switches: `allow_tf32` and, since 2.9, `fp32_precision`. Writing an old one writes the new
    one too, but not the other way round. Reading an old one raises RuntimeError when the two disagree.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    cpu_matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    switches = (matmul, cudnn.conv, cudnn.rnn, cpu_matmul)  # pyright: ignore[reportAttributeAccessIssue]
    precisions = [switch.fp32_precision for switch in switches]
    try:
        name = torch.get_float32_matmul_precision()
    except RuntimeError:  # the two disagree, so the old switch is the opposite of the new one
        name = "highest" if precisions[0] == "tf32" else "high"
    try:
        convolutions = cudnn.allow_tf32
    except RuntimeError:
        convolutions = precisions[1] != "tf32"

    def restore() -> None:
        torch.set_float32_matmul_precision(name)  # the old switch of products; it has three values, allow_tf32 two
        cudnn.allow_tf32 = convolutions
        for switch, precision in zip(switches, precisions, strict=True):
            switch.fp32_precision = precision

    return restore
