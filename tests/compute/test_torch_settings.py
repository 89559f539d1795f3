"""PyTorch's process-wide settings are set inside the block and restored after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tadperf.compute.torch_settings import torch_settings

MATMUL: Any = torch.backends.cuda.matmul
CUDNN: Any = torch.backends.cudnn
MKLDNN: Any = torch.backends.mkldnn


def read(get: Callable[[], Any]) -> Any:
    """Returns a setting, or "unreadable": PyTorch refuses to read an old switch that contradicts a new one."""
    try:
        return get()
    except RuntimeError:
        return "unreadable"


def settings() -> list[Any]:
    return [
        read(get)
        for get in (
            torch.get_num_threads,
            torch.get_float32_matmul_precision,
            lambda: MATMUL.allow_tf32,
            lambda: CUDNN.allow_tf32,
            lambda: MATMUL.fp32_precision,
            lambda: CUDNN.conv.fp32_precision,
            lambda: CUDNN.rnn.fp32_precision,
            lambda: MKLDNN.matmul.fp32_precision,
            lambda: CUDNN.benchmark,
        )
    ]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Restores PyTorch's defaults after each test."""
    yield
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = MKLDNN.matmul.fp32_precision = "none"
    CUDNN.allow_tf32 = True
    CUDNN.benchmark = False


def keep_defaults() -> None:
    pass


def old_switches() -> None:
    MATMUL.allow_tf32, CUDNN.allow_tf32 = True, False


def named_precision() -> None:
    torch.set_float32_matmul_precision("medium")


def new_matmul_switch() -> None:
    MATMUL.fp32_precision = "tf32"


def new_matmul_switch_off() -> None:
    torch.set_float32_matmul_precision("high")
    MATMUL.fp32_precision = "ieee"


def new_cudnn_switches() -> None:
    CUDNN.conv.fp32_precision = CUDNN.rnn.fp32_precision = "ieee"


STATES = [
    keep_defaults,
    old_switches,
    named_precision,
    new_matmul_switch,
    new_matmul_switch_off,
    new_cudnn_switches,
]


@pytest.mark.parametrize("prepare", STATES)
@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_set_inside_and_restored_after_with_old_and_new_switches(prepare: Callable[[], None], tf32: bool):
    prepare()
    before = settings()
    with torch_settings(tf32=tf32):
        assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (tf32, tf32)
        assert (MATMUL.fp32_precision == "tf32", CUDNN.conv.fp32_precision == "tf32") == (tf32, tf32)
        inside = settings()
    assert settings() == before != inside


@pytest.mark.parametrize("prepare", STATES)
def test_none_changes_nothing(prepare: Callable[[], None]):
    prepare()
    before = settings()
    with torch_settings():
        assert settings() == before
    assert settings() == before


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("inside", [False, True, None])
def test_the_benchmark_of_cudnn_is_set_inside_and_restored_after(before: bool, inside: bool | None):
    CUDNN.benchmark = before
    with torch_settings(benchmark=inside):
        assert CUDNN.benchmark == (before if inside is None else inside)
    assert CUDNN.benchmark == before


def test_threads_are_restored_after_an_error():
    before = settings()

    def fail() -> None:
        with torch_settings(threads=before[0] + 2, tf32=True, benchmark=True):
            assert torch.get_num_threads() == before[0] + 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert settings() == before


def test_blocks_can_be_nested():
    before = settings()
    with torch_settings(threads=1, tf32=True):
        with torch_settings(threads=2, tf32=False):
            assert (torch.get_num_threads(), MATMUL.allow_tf32) == (2, False)
        assert (torch.get_num_threads(), MATMUL.allow_tf32, CUDNN.allow_tf32) == (1, True, True)
    assert settings() == before
