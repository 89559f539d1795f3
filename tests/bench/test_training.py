"""The benches of experts and students: the published loop trains the same weights as tadperf."""

from __future__ import annotations

import pytest
import torch

from tadperf.bench.stages import experts, published_training, runner, students
from tadperf.config import NetConfig
from tadperf.nets import training
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.nets.training import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
NET = NetConfig.model_validate({"width": 5, "depth": 1})
SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    expert = experts.Case(NET, SHAPE, 20, 3, Recipe(2, 8, 0.1, 0.0, 0.0, "flip", decay=False))
    student = students.Case(NET, SHAPE, 30, Recipe(2, 256, 0.1, 0.9, 5e-4, "flip"))
    monkeypatch.setitem(experts.SIZES, "tiny", expert)
    monkeypatch.setitem(students.SIZES, "tiny", student)
    monkeypatch.setattr(runner, "peak_memory", lambda *_: None)  # the real one starts a process


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("decay", [False, True])
def test_the_published_loop_trains_the_same_weights(soft, decay):
    """With full batches and no augmentation nothing is random, and only the order of sums differs."""
    images, labels = experts.data(experts.SIZES["tiny"], CPU)
    wanted = 3.0 * torch.nn.functional.one_hot(labels, 10).float() if soft else labels
    recipe, weights = Recipe(7, 20, 0.2, 0.9, 1e-3, "none", decay=decay), []
    for loop in (published_training.fit, training.fit):
        module, snapshots = build(NET, SHAPE, 10, 0), []
        flat = FlatNet(module)
        loop(module, images, wanted, recipe, 1, lambda _, flat=flat, weights=snapshots: weights.append(flat.flatten()))
        assert len(snapshots) == recipe.epochs
        weights.append(torch.stack(snapshots))
        assert published_training.accuracy(module, images, labels) == training.accuracy(module, images, labels)
    assert (weights[0][-1] - weights[0][0]).norm() > 0.1
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_rows_of_experts():
    rows = experts.measure("tiny", CPU, 2)
    assert [row["provider"] for row in rows] == ["tadperf", "published"]
    for row in rows:
        assert row["samples_s"] == pytest.approx(
            3 * 2 * 20 / row["median_ms"] * 1e3, rel=0.5
        )  # samples_s uses the larger one of two times
    assert rows[0]["over_published"] == pytest.approx(rows[1]["median_ms"] / rows[0]["median_ms"])


def test_rows_of_students():
    rows = students.measure("tiny", CPU, 1)
    assert [row["provider"] for row in rows] == ["tadperf", "published"]
    assert rows[0]["over_published"] == pytest.approx(rows[1]["median_ms"] / rows[0]["median_ms"])
