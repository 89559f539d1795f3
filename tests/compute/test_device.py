"""Names of devices, and the errors for devices that do not exist."""

from __future__ import annotations

import os

import pytest
import torch

from tadperf.cli import options
from tadperf.compute import ranks
from tadperf.compute.device import describe_device, resolve_device
from tadperf.errors import UserError

COUNT = torch.cuda.device_count()


def test_a_name_gives_its_device():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto") == torch.device("cuda:0" if COUNT else "cpu")
    assert describe_device(resolve_device("cpu"))


@pytest.mark.parametrize("name", [f"cuda:{COUNT}", "cpu:0", "cuda:x", "cuda:-1", "mps", ""])
def test_an_unknown_or_missing_device_is_refused(name):
    with pytest.raises(UserError) as caught:
        resolve_device(name)
    assert caught.value.field == "--device"
    assert caught.value.value == name


@pytest.mark.parametrize(("count", "remedy"), [(1, "use cuda:0"), (4, "use cuda:0 to cuda:3")])
def test_the_error_for_a_missing_cuda_device_names_the_existing_ones(monkeypatch, count, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    plural = "s" if count > 1 else ""
    with pytest.raises(UserError, match=rf"^--device: cuda:7: only {count} CUDA device{plural} found; {remedy}$"):
        resolve_device("cuda:7")


def test_more_ranks_than_cuda_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ranks, "_team", ranks.Team(0, 2, None))
    with pytest.raises(UserError, match=r"^--devices: 2: only 1 CUDA device found; use --devices 1$"):
        resolve_device("cuda")


@pytest.mark.parametrize(("name", "visible"), [("cpu", ""), ("auto", "0,1"), ("cuda:1", "0,1"), (None, "0,1")])
def test_the_command_line_hides_gpus_only_for_device_cpu(monkeypatch, name, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    options._shared_options([options.OPTIONS["--device"]], {"device": name})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
