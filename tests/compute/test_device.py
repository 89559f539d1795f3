"""Which device a name means."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tadperf.compute.device import describe_device, resolve_device
from tadperf.config.merge import merge
from tadperf.errors import UserError
from tadperf.pipeline.prepare import prepare

COUNT = torch.cuda.device_count()


def test_names():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto") == torch.device("cuda:0" if COUNT else "cpu")
    assert describe_device(resolve_device("cpu"))


@pytest.mark.parametrize("name", [f"cuda:{COUNT}", "cpu:0", "cuda:x", "cuda:-1", "mps", ""])
def test_what_is_not_there_is_refused(name):
    with pytest.raises(UserError) as caught:
        resolve_device(name)
    assert caught.value.field == "--device"
    assert caught.value.value == name


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_what_the_config_says_whatever_asks_for_the_device(monkeypatch, tf32):
    """The flags are there without a GPU; that there is one is all that is made up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    flags: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = not tf32
        task = prepare(merge("digits", None, [f"tf32={str(tf32).lower()}"], {"device": "cuda"}))
        assert task.device == torch.device("cuda", 0)
        assert resolve_device("cuda") == task.device  # as a run's environment and every evaluation ask
        assert [flag.allow_tf32 for flag in flags] == [tf32, tf32]
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value
