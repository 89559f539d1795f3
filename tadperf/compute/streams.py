"""CUDA streams that belong to one user at a time."""

from __future__ import annotations

import weakref

import torch

POOL = 32  # PyTorch hands out this many different streams in turn, and then the first one again

_free: dict[torch.device, list[torch.cuda.Stream]] = {}  # those without a user
_handles: dict[torch.device, set[int]] = {}  # of all streams that this module ever gave away


def own_stream(user: object, device: torch.device) -> torch.cuda.Stream:
    """Returns a stream of a CUDA device that nobody else gets from this function while `user` lives.

    A graph needs its own stream for its recording. PyTorch keeps one cuBLAS workspace for each stream, and recorded
    kernels keep its address. Two graphs of one stream would write to it at the same time, and the end of one graph
    frees it under the other one (pytorch/pytorch issue 193402).
    Raises RuntimeError if all streams are in use.
    """
    free = _free.setdefault(device, [])
    stream = free.pop() if free else _new_stream(device)
    weakref.finalize(user, free.append, stream)
    return stream


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    handles = _handles.setdefault(device, set())
    for _ in range(POOL):
        stream = torch.cuda.Stream(device)
        if stream.cuda_stream not in handles:
            handles.add(stream.cuda_stream)
            return stream
    raise RuntimeError(f"all {POOL} streams of {device} are in use")
