"""Expert trajectories: how they are trained, stored, resumed and shared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tadperf import seeds
from tadperf.config import ExpertConfig, NetConfig
from tadperf.errors import UserError
from tadperf.experts import store
from tadperf.experts.store import Experts
from tadperf.experts.train import train_expert, train_experts
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.nets.problem import Problem
from tadperf.nets.training import Recipe, accuracy

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, SHAPE, CLASSES, EPOCHS = torch.device("cpu"), (1, 8, 8), 3, 3
NET = NetConfig(depth=1, width=4)
SIZE = FlatNet(build(NET, SHAPE, CLASSES, 0)).num_parameters
IDENTITY = {"data": "abc", "net": {"depth": 1}, "lr": 0.1}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator, labels = torch.Generator().manual_seed(0), torch.arange(60) % CLASSES
    return torch.randn(CLASSES, *SHAPE, generator=generator)[labels] + 0.1, labels


def problem() -> Problem:
    return Problem(*data(), ("a", "b", "c"), NET, "color_crop_flip", 7, CPU)


def train(folder: Path, count: int = 3, epochs: int = EPOCHS, **values: Any) -> list[int]:
    """Trains the missing experts; returns the number of experts at each progress report."""
    config = ExpertConfig(count=count, batch=20, lr=0.1, **values)
    counts: list[int] = []
    train_experts(folder, problem(), config, epochs, IDENTITY, lambda stage, done, total, **_: counts.append(done))
    return counts


def modification_times(folder: Path) -> list[int]:
    return [store.expert_path(folder, index).stat().st_mtime_ns for index in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "experts"
    assert train(folder) == [0, 1, 2, 3]
    return folder


def test_a_trajectory_starts_at_the_initial_weights_and_ends_at_the_trained_ones():
    images, labels = data()
    recipe = Recipe(EPOCHS, 20, 0.1, 0.0, 0.0, "color_crop_flip", decay=False)
    snapshots, score = train_expert(problem(), recipe, 11)
    assert (snapshots.shape, snapshots.dtype) == ((EPOCHS + 1, SIZE), torch.float32)
    assert torch.equal(snapshots[0], FlatNet(build(NET, SHAPE, CLASSES, 11)).flatten())
    assert ((snapshots[1:] - snapshots[:-1]).norm(dim=1) > 1e-3).all()
    module = build(NET, SHAPE, CLASSES, 0)
    torch.nn.utils.vector_to_parameters(snapshots[-1], module.parameters())
    assert score == accuracy(module, images, labels) > 0.5
    short, _ = train_expert(problem(), recipe._replace(epochs=1), 11)
    assert torch.equal(short, snapshots[:2])  # an epoch does not depend on how many follow


def test_weights_and_rho_change_the_trajectory_and_confident_soft_labels_do_not():
    _, labels = data()
    recipe = Recipe(EPOCHS, 20, 0.1, 0.0, 0.0, "color_crop_flip", decay=False)

    def expert(labels: torch.Tensor = labels, recipe: Recipe = recipe, weights: torch.Tensor | None = None):
        return train_expert(replace(problem(), labels=labels, weights=weights), recipe, 11)

    default, score = expert()
    confident, soft_score = expert(100.0 * torch.nn.functional.one_hot(labels, CLASSES))
    torch.testing.assert_close(confident, default, rtol=1e-4, atol=1e-5)
    assert soft_score == score
    for other in (expert(weights=torch.arange(60.0)), expert(recipe=recipe._replace(rho=0.5))):
        assert torch.equal(other[0][0], default[0])
        assert ((other[0] - default)[1:].norm(dim=1) > 1e-3).all()


def test_rho_and_alpha_of_the_config_change_the_experts(folder, tmp_path):
    train(tmp_path, count=1, rho=0.5, alpha=0.3)
    recipe = Recipe(EPOCHS, 20, 0.1, 0.0, 0.0, "color_crop_flip", False, 0.5, 0.3)
    flat, _ = train_expert(problem(), recipe, seeds.derive(7, "expert", 0))
    torch.testing.assert_close(load_file(store.expert_path(tmp_path, 0))["snapshots"], flat)
    assert not torch.equal(flat, load_file(store.expert_path(folder, 0))["snapshots"])


def test_stored_snapshots_equal_the_trained_ones(folder):
    experts = Experts.open(folder, 3)
    recipe = Recipe(EPOCHS, 20, 0.1, 0.0, 0.0, "color_crop_flip", decay=False)
    assert len(experts) == 3
    for index in range(3):
        stored = load_file(store.expert_path(folder, index))["snapshots"]
        seed = seeds.derive(7, "expert", index)
        torch.testing.assert_close(stored, train_expert(problem(), recipe, seed)[0])
        for epoch in range(EPOCHS + 1):
            row = experts.snapshot(index, epoch)
            assert torch.equal(row, stored[epoch])
            row.zero_()  # a row is a copy
            assert torch.equal(experts.snapshot(index, epoch), stored[epoch])
    assert not torch.equal(experts.snapshot(0, 0), experts.snapshot(1, 0))
    assert len(experts.train_accuracies()) == 3
    assert all(0 < score <= 1 for score in experts.train_accuracies())


def test_the_number_of_workers_changes_no_byte(folder, tmp_path):
    train(tmp_path / "alone", workers=1)
    for index in range(3):
        assert (
            store.expert_path(tmp_path / "alone", index).read_bytes() == store.expert_path(folder, index).read_bytes()
        )


def test_only_missing_experts_are_trained(tmp_path):
    place = tmp_path / "experts"
    train(place)
    before, second = modification_times(place), store.expert_path(place, 1).read_bytes()
    assert train(place) == [3]
    assert modification_times(place) == before
    store.expert_path(place, 1).write_bytes(second[: len(second) // 2])  # tadperf itself never writes half a file
    assert train(place) == [2, 3]
    assert store.expert_path(place, 1).read_bytes() == second
    assert [now == then for now, then in zip(modification_times(place), before, strict=True)] == [True, False, True]
    assert train(place, epochs=EPOCHS - 1) == [3]  # longer trajectories may be used
    assert train(place, epochs=EPOCHS + 1) == [0, 1, 2, 3]
    assert load_file(store.expert_path(place, 0))["snapshots"].shape == (EPOCHS + 2, SIZE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_snapshots_on_a_device_equal_those_of_the_files(tmp_path, dtype):
    train(tmp_path, count=2, dtype=dtype)
    experts = Experts.open(tmp_path, 2)
    resident = experts.load_to(torch.device("cpu"), range(1, EPOCHS + 1))
    assert len(resident) == 2
    for index in range(2):
        for epoch in range(1, EPOCHS + 1):
            assert torch.equal(resident.snapshot(index, epoch), experts.snapshot(index, epoch))
    assert experts.resident(torch.device("cpu"), range(1, 2)) is experts  # only a GPU needs them


def test_bfloat16_halves_the_file_and_is_read_as_float32(folder, tmp_path):
    train(tmp_path, count=1, dtype="bfloat16")
    stored = load_file(store.expert_path(tmp_path, 0))["snapshots"]
    assert stored.dtype == torch.bfloat16
    row, exact = Experts.open(tmp_path, 1).snapshot(0, 2), Experts.open(folder, 3).snapshot(0, 2)
    assert row.dtype == torch.float32
    assert torch.equal(row, exact.bfloat16().float())
    assert not torch.equal(row, exact)


def test_the_error_for_a_folder_of_other_experts_names_the_difference(folder):
    store.claim_folder(folder, IDENTITY)  # the same identity
    with pytest.raises(UserError, match=r"lr = 0\.1, this run needs 0\.2") as refused:
        store.claim_folder(folder, IDENTITY | {"lr": 0.2})
    assert (refused.value.field, refused.value.value) == ("--experts", folder)
    with pytest.raises(UserError, match=r"net = \{'depth': 1\}, this run needs \{'depth': 2\}"):
        store.claim_folder(folder, IDENTITY | {"net": {"depth": 2}})
    with pytest.raises(UserError, match="momentum = None, this run needs"):
        store.claim_folder(folder, IDENTITY | {"momentum": 0.9})


def test_experts_are_found_in_a_run_folder_and_in_their_own_folder(folder, tmp_path):
    shape = (EPOCHS + 1, SIZE)
    assert store.find_experts(folder, 3, shape, IDENTITY) == folder
    assert store.find_experts(folder.parent, 2, shape, IDENTITY) == folder
    with pytest.raises(UserError, match="holds 3 of 4 experts with 4 snapshots"):
        store.find_experts(folder, 4, shape, IDENTITY)
    with pytest.raises(UserError, match="holds 0 of 3 experts with 5 snapshots"):
        store.find_experts(folder, 3, (EPOCHS + 2, SIZE), IDENTITY)
    with pytest.raises(UserError, match="this run needs"):
        store.find_experts(folder, 3, shape, IDENTITY | {"data": "other"})
    with pytest.raises(UserError, match="holds no experts"):
        store.find_experts(tmp_path, 3, shape, IDENTITY)
    with pytest.raises(UserError, match="no such folder"):
        store.find_experts(tmp_path / "absent", 3, shape, IDENTITY)


def test_damaged_files_and_files_of_other_programs_are_refused_or_trained_again(tmp_path):
    shape = (EPOCHS + 1, SIZE)
    path = store.expert_path(tmp_path, 0)
    with pytest.raises(UserError, match=r"^--experts: .*expert-0000.safetensors: cannot be read"):
        Experts.open(tmp_path, 1)
    for damaged in ({"snapshots": torch.zeros(4)}, {"other": torch.zeros(shape)}, {"snapshots": torch.zeros(1, SIZE)}):
        save_file(damaged, path)
        assert not store.is_complete(tmp_path, 0, shape)
    save_file({"snapshots": torch.zeros(shape)}, path)
    assert store.is_complete(tmp_path, 0, shape)
    with pytest.raises(UserError, match="has no train_accuracy; train it again"):
        Experts.open(tmp_path, 1).train_accuracies()
    path.write_bytes(b"{")
    with pytest.raises(UserError, match="cannot be read"):
        Experts.open(tmp_path, 1)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"cannot be read .*; check its permissions"):
        store.is_complete(tmp_path, 0, shape)


@pytest.mark.parametrize("text", ["", "[1]", "null", "{"])
def test_a_damaged_description_of_experts_is_refused(tmp_path, text):
    (tmp_path / store.IDENTITY).write_text(text)
    with pytest.raises(UserError, match=r"^--experts: .*experts.json: is damaged; delete the folder"):
        store.claim_folder(tmp_path, IDENTITY)
