"""A call on small tensors costs little Python: a limit on the functions that it calls, which a loaded machine keeps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

from tadperf.kernels import native, norm_relu_pool, per_sample

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())


def count_calls(function: Callable[[], Any]) -> int:
    """Returns how many Python and C functions a call of `function` calls."""
    events = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal events
        events += event in ("call", "c_call")

    function()  # the first call loads compiled code
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return events - 2  # `function` itself and sys.setprofile


def test_per_sample():
    """46 functions take 17 us (CPU time of one thread). The checks once needed 78 functions and 25 us."""
    logits, labels = torch.randn(100, 10), torch.arange(100) % 10
    assert count_calls(lambda: per_sample(logits, labels)) <= 50


def test_norm_relu_pool():
    """64 functions take 14 us (CPU time of one thread). The checks once needed 97 functions and 24 us."""
    x, weight, bias = torch.randn(4, 4, 4, 4), torch.rand(4), torch.rand(4)
    assert count_calls(lambda: norm_relu_pool(x, weight, bias)) <= 68
