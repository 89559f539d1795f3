"""Replay buffers of published code are read as experts; hostile and wrong ones are refused in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tadperf.config import NetConfig
from tadperf.errors import UserError
from tadperf.experts.replay_buffer import buffer_files, check_buffer, load_buffer
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet

NET = FlatNet(build(NetConfig(depth=1, width=4), (3, 8, 8), 3, 0))
EPOCHS = 2


def make_experts(count: int, epochs: int = EPOCHS, seed: int = 0) -> list[list[list[Tensor]]]:
    """Returns experts as MTT's code stores them: lists of lists of the parameters of a network."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [[torch.randn(shape, generator=generator) for shape in NET.shapes] for _ in range(epochs + 1)]
        for _ in range(count)
    ]


def test_snapshots_are_the_parameters_in_their_order(tmp_path):
    experts = make_experts(3, epochs=4)
    torch.save(experts, tmp_path / "replay_buffer_0.pt")
    found = load_buffer(tmp_path / "replay_buffer_0.pt", 2, EPOCHS, NET.shapes)
    assert len(found) == 2
    expected = torch.cat([p.flatten() for p in experts[1][2]])
    assert torch.equal(found.snapshot(1, 2), expected)
    found.snapshot(1, 2).zero_()  # a copy
    assert torch.equal(found.snapshot(1, 2), expected)
    named = NET.views(found.snapshot(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(named.values(), experts[1][2], strict=True))
    resident = found.load_to(torch.device("cpu"), range(1, 3))
    assert torch.equal(resident.snapshot(1, 2), expected)
    assert found.resident(torch.device("cpu"), range(3)) is found
    with pytest.raises(UserError, match="holds no train accuracy"):
        found.train_accuracies()


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for number in (0, 2, 10):
        torch.save(make_experts(2, seed=number), tmp_path / f"replay_buffer_{number}.pt")
    torch.save([], tmp_path / "replay_buffer_old.pt")
    assert [file.name for file in buffer_files(tmp_path)] == [f"replay_buffer_{n}.pt" for n in (0, 2, 10)]
    found = load_buffer(tmp_path, 5, EPOCHS, NET.shapes)
    last = torch.cat([p.flatten() for p in make_experts(2, seed=10)[0][0]])
    assert torch.equal(found.snapshot(4, 0), last)
    (tmp_path / "replay_buffer_2.pt").write_bytes(b"")
    assert len(load_buffer(tmp_path, 2, EPOCHS, NET.shapes)) == 2  # files that are not needed are not opened
    assert buffer_files(tmp_path / "none") == []


def test_files_of_old_versions_of_torch_are_read(tmp_path):
    experts = make_experts(1)
    torch.save(experts, tmp_path / "replay_buffer_0.pt", _use_new_zipfile_serialization=False)
    found = load_buffer(tmp_path, 1, EPOCHS, NET.shapes)
    assert torch.equal(found.snapshot(0, 1), torch.cat([p.flatten() for p in experts[0][1]]))


class Runs:
    """An object whose pickle calls a function that makes the folder it_ran."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("it_ran",)


def changed(position: int, value: Any) -> list[list[list[Any]]]:
    experts: list[list[list[Any]]] = make_experts(2)
    experts[1][0][position] = value
    return experts


WRONG: dict[str, tuple[Any, str]] = {
    "code": ([[[Runs()]]], "refused, it holds more than plain tensors .*mkdir"),
    "a tensor": (torch.zeros(3, 3), "is no replay buffer: must hold a list of experts"),
    "nothing": ([], "is no replay buffer: must hold a list"),
    "a state dict": ({"a": torch.zeros(1)}, "is no replay buffer: must hold a list"),
    "vectors": ([[torch.zeros(9)] * 3], "is no replay buffer: a snapshot of expert 0 is no list of float tensors"),
    "integers": (changed(0, torch.zeros(4, 3, 3, 3, dtype=torch.int64)), "a snapshot of expert 1 is no list of float"),
    "a sparse tensor": (changed(0, torch.zeros(4, 3, 3, 3).to_sparse()), "a snapshot of expert 1 is no list of float"),
    "another width": (
        changed(0, torch.zeros(8, 3, 3, 3)),
        r"parameter 0 of shape \[8, 3, 3, 3\], not \[4, 3, 3, 3\]; set",
    ),
    "missing parameters": ([[[torch.zeros(4, 3, 3, 3)]] * 3], "expert 0 has 1 parameters, not 6; set net.width"),
    "too few epochs": (make_experts(2, epochs=1), "expert 0 has 1 epochs, this run needs 2; lower experts.epochs"),
    "an empty expert": ([[]], "expert 0 has 0 epochs, this run needs 2"),
    "too few experts": (make_experts(1), "holds 1 of 2 experts; use --set experts.count=1, or add files"),
    "NaN": (changed(0, torch.full((4, 3, 3, 3), float("nan"))), "expert 1 holds NaN or infinite weights"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_no_experts_are_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, message = WRONG[name]
    torch.save(content, tmp_path / "replay_buffer_0.pt")
    with pytest.raises(UserError, match="--experts: .*" + message) as error:
        load_buffer(tmp_path / "replay_buffer_0.pt", 2, EPOCHS, NET.shapes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("damage", [b"", b"text", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n"])
def test_damaged_files_are_refused_in_one_line(tmp_path, damage):
    (tmp_path / "a.pt").write_bytes(damage)
    with pytest.raises(UserError, match=r"--experts: .*a\.pt: (not a valid|refused|a Git LFS pointer)") as error:
        check_buffer(tmp_path / "a.pt", 1, EPOCHS, NET.shapes)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"--experts: .*b\.pt: no such file"):
        check_buffer(tmp_path / "b.pt", 1, EPOCHS, NET.shapes)
