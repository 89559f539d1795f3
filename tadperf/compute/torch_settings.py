"""PyTorch's process-wide settings, set for a block and restored after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torch_settings(*, threads: int | None = None, tf32: bool | None = None) -> Iterator[None]:
    """Sets the number of CPU threads and the TF32 switches inside the block, and restores both after it (tadperf).

    threads: CPU threads of PyTorch's operators; None keeps the number.
    tf32: whether float32 products and convolutions on CUDA may use TensorFloat-32, which keeps 10 bits of the mantissa.
    PyTorch's own default is yes for convolutions and no for products. None keeps both switches.
    """
    before = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if tf32 is not None:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        yield
    finally:
        if torch.get_num_threads() != before[0]:
            torch.set_num_threads(before[0])
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[1:]
