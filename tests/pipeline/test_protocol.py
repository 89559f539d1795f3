"""Protocols: the images and labels of each row, equal initial weights, rates without the test data, clear refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tadperf import artifact
from tadperf.errors import UserError
from tadperf.files import load_tensors
from tadperf.nets import students as students_module
from tadperf.nets.students import Examples, Student, score_students
from tadperf.pipeline import evaluate as evaluate_module
from tadperf.pipeline import protocol as protocol_module
from tadperf.pipeline import protocol_scorers
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.evaluate import evaluate_protocol
from tadperf.pipeline.package import INITIAL
from tadperf.pipeline.prepare import prepare
from tadperf.pipeline.protocol import ProtocolRun, examples, image_sets, needs_teacher, row_recipes
from tadperf.pipeline.protocol_scorers import PairedScorer, RD3Scorer, Teacher, train_teacher
from tadperf.pipeline.trusted_view import open_trusted_view
from tadperf.run.folder import Run
from tadperf.trust.state import TrustState

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config) -> Path:
    """Returns the folder of a finished run with trust and soft labels, two images per class."""
    place = tmp_path_factory.mktemp("protocol") / "run"
    values = {"match__ipc": 2, "match__soft_labels": True, "trust__mode": "on", "trust__proxies": 2}
    task = prepare(tiny_config(**values))
    with Run.create(place, task.config) as opened:
        distill_task(task, opened)
    return place


@pytest.fixture(scope="module")
def make_run(folder) -> Any:
    """Returns a function that makes the values of a protocol. There are no test data, so nothing can use them."""
    distilled = artifact.load(folder)
    task, samples = open_trusted_view(distilled, folder, CPU)
    known = Examples(samples.images, samples.labels, samples.weights)
    recipe = protocol_module.full_recipe(distilled, task.config.evaluate)
    teacher = train_teacher(known, 10, distilled.net, recipe, 2, 0, CPU)

    def make(protocol: str) -> ProtocolRun:
        labels = teacher if needs_teacher(protocol, distilled) else None
        sets, evaluate = image_sets(distilled, samples, folder, 0), task.config.evaluate
        nothing: Any = None
        return ProtocolRun(
            protocol, distilled, samples, sets, labels, nothing, evaluate, 2, 0, CPU, lambda *_, **__: None
        )

    return make


def test_the_trusted_view_is_that_of_the_run(folder, make_run):
    run = make_run("hard")
    index, labels, _ = TrustState.load(folder / "trust.safetensors").view()
    assert len(index) < 1400  # the untrusted samples are left out
    both = torch.cat([run.samples.labels, run.samples.held_out_labels])
    assert torch.equal(both.bincount(), labels.bincount())
    sets = {row: make(0) for row, make in run.sets.items()}
    assert list(sets) == list(protocol_module.ROWS)
    confirmed = run.samples.images[run.samples.confirmed.nonzero()[:, 0]]
    for row in ("initial", "k_means", "k_centres", "random"):  # the run started from real images
        assert sets[row].classes.tolist() == [c for c in range(10) for _ in range(2)]
        equal = (sets[row].images[:, None] == confirmed[None]).flatten(2).all(2)
        assert equal.any(1).all()


def test_only_random_images_change_with_the_repeat(make_run):
    for row, make in make_run("hard").sets.items():
        assert torch.equal(make(0).images, make(1).images) == (row != "random")
        assert torch.equal(make(1).images, make(1).images)


def test_the_labels_of_a_row_depend_on_the_protocol(folder, make_run):
    distilled, initial = artifact.load(folder), artifact.load(folder / INITIAL)
    assert distilled.labels.is_floating_point()
    for protocol in ("hard", "rd3"):
        run = make_run(protocol)
        for row, make in run.sets.items():
            assert torch.equal(examples(run, row, 0).labels, make(0).classes)
    soft, published = make_run("soft"), make_run("published")
    for row, make in soft.sets.items():
        assert torch.equal(examples(soft, row, 0).labels, soft.teacher(make(0).images))  # one teacher for all rows
        assert torch.equal(torch.as_tensor(examples(soft, f"{row}_plain", 0).images), make(0).images)
    assert torch.equal(examples(published, "distilled", 0).labels, distilled.labels)
    assert torch.equal(examples(published, "initial", 0).labels, initial.labels)
    random = published.sets["random"](0).images
    assert torch.equal(examples(published, "random", 0).labels, published.teacher(random))
    assert torch.equal(examples(published, "distilled_hard", 0).labels, torch.arange(10).repeat_interleave(2))


def test_a_teacher_averages_the_logits_of_its_networks(make_run):
    teacher, images = make_run("soft").teacher, make_run("soft").sets["k_means"](0).images
    assert len(teacher.networks) == 2
    expected = (teacher.networks[0](images) + teacher.networks[1](images)) / 2
    torch.testing.assert_close(teacher(images), expected)
    assert not torch.equal(teacher.networks[0](images), teacher.networks[1](images))


def weights_of(scorer: Any, rows: list[Student], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the seeds of the initial weights, in the order of the students."""
    seeds: list[int] = []
    build = students_module.build

    def record(*arguments: Any) -> torch.nn.Module:
        seeds.append(arguments[-1])
        return build(*arguments)

    for module in (students_module, protocol_scorers):
        monkeypatch.setattr(module, "build", record)
    for student in rows:
        scorer(student)
    return seeds


def test_all_rows_of_a_repeat_have_the_same_initial_weights(make_run, monkeypatch):
    run = make_run("soft")
    test = run.samples.held_out[torch.arange(20)], run.samples.held_out_labels[:20]
    recipe, given = run.distilled.recipe._replace(epochs=1), examples(run, "random", 0)
    hard = Examples(given.images, run.sets["random"](0).classes)
    rows = [Student(row, k, run.distilled.net, recipe, lambda: hard) for k in (0, 1) for row in ("distilled", "random")]
    for scorer in (PairedScorer(*test, 10, 0, CPU), RD3Scorer(*test, 10, 0, CPU, run.teacher)):
        with monkeypatch.context() as patch:
            first, second, third, fourth = weights_of(scorer, rows, patch)
        assert (first, third) == (second, fourth)
        assert first != third
        scores: dict[tuple[str, int], float] = {}
        score_students(scorer, rows, lambda s, score, scores=scores: scores.update({(s.row, s.repeat): score}))
        assert scores["distilled", 0] == scores["random", 0]  # equal images, so everything else is equal


def test_learning_rates_are_chosen_without_the_test_data(make_run):
    run = make_run("hard")
    recipes = row_recipes(run, run.distilled.net)
    assert set(recipes) == {*run.sets, "distilled_hard"}
    assert {recipe.lr for recipe in recipes.values()} <= {run.distilled.recipe.lr, run.evaluate.real_lr}
    assert {recipe.epochs for recipe in recipes.values()} == {run.distilled.recipe.epochs}  # equal steps
    published = row_recipes(make_run("published"), run.distilled.net)
    assert published["distilled"].lr == run.distilled.recipe.lr
    assert {published[row].lr for row in ("initial", "k_means", "random")} == {run.evaluate.real_lr}


def test_a_row_takes_the_rate_that_is_better_on_held_out_samples(make_run, monkeypatch):
    run, seen = make_run("soft"), []

    def scores(_: Any, scorer: Any, rows: Any, __: str) -> dict[str, list[float]]:
        seen.extend(rows)
        assert scorer.test_images is run.samples.held_out
        return {
            s.row: [float(s.recipe.lr == (0.5 if s.row.startswith("random") else run.evaluate.real_lr))] for s in rows
        }

    monkeypatch.setattr(protocol_module, "_scores", scores)
    run = replace(run, distilled=replace(run.distilled, recipe=run.distilled.recipe._replace(lr=0.5)))
    recipes = row_recipes(run, run.distilled.net)
    assert {row: recipe.lr for row, recipe in recipes.items()} == dict.fromkeys(recipes, run.evaluate.real_lr) | {
        "random": 0.5
    }
    assert len(seen) == len(recipes) * 2 * protocol_module.RATE_STUDENTS


@pytest.mark.parametrize("protocol", ["hard", "soft", "published", "rd3"])
def test_every_protocol_returns_all_rows_and_a_verdict(folder, protocol, monkeypatch):
    monkeypatch.setattr(protocol_module, "RD3_RECIPE", protocol_module.RD3_RECIPE._replace(epochs=2))
    monkeypatch.setattr(evaluate_module, "RD3_TEACHER", "convnet")
    file = folder / "distilled.safetensors"
    result = evaluate_protocol(file, protocol, networks=["convnet"], repeats=6)
    measured = result["networks"]["convnet"]
    assert (result["protocol"], result["ipc"], result["repeats"]) == (protocol, 2, 6)
    assert set(measured["rows"]) == {*protocol_module.ROWS, *protocol_module.SCORED, "full"}
    for row in protocol_module.ROWS:
        scores = measured["rows"][row]
        assert len(scores["runs"]) == 6
        low, high = scores["interval"]
        assert low <= scores["mean"] <= high
        assert ("against_distilled" in scores) == (row != "distilled")
    assert measured["comparison"]["verdict"] in ("gain", "no difference", "worse")
    assert set(measured["comparison"]) == {"best", "gain", "p", "verdict"}
    assert 0 < measured["ddranking"]["lrs"]["mean"] < 1
    assert len(measured["ddranking"]["ars"]["runs"]) == 6
    if protocol == "hard":
        assert measured["rows"]["distilled_hard"]["runs"] == measured["rows"]["distilled"]["runs"]
        assert evaluate_protocol(file, protocol, networks=["convnet"], repeats=6) == result


def test_all_rows_train_with_the_given_optimizer(folder, monkeypatch):
    seen: list[Student] = []

    def record(run: ProtocolRun, net: Any) -> dict[str, Any]:
        seen.extend(protocol_module.protocol_students(run, net, row_recipes(run, net)))
        return {"rows": {"distilled": {}}}

    monkeypatch.setattr(evaluate_module, "measure", record)
    evaluate_protocol(folder / "distilled.safetensors", "published", repeats=1, optimizer="muon")
    assert {student.recipe.optimizer for student in seen} == {"muon"}
    assert {"distilled", "random", "k_means", "full"} <= {student.row for student in seen}
    with pytest.raises(UserError, match="--optimizer: muon: the protocol rd3 always trains with Adam"):
        evaluate_protocol(folder / "distilled.safetensors", "rd3", optimizer="muon")


def test_the_file_keeps_an_optimizer_that_is_not_sgd(folder, tmp_path):
    given = artifact.load(folder)
    assert given.recipe.optimizer == "sgd"
    replace(given, recipe=given.recipe._replace(optimizer="muon")).save(tmp_path / "muon.safetensors")
    assert artifact.load(tmp_path / "muon.safetensors").recipe.optimizer == "muon"
    given.save(tmp_path / "sgd.safetensors")
    assert "optimizer" not in json.loads(load_tensors(tmp_path / "sgd.safetensors")[1]["tadperf"])["recipe"]


def test_an_unknown_protocol_is_refused_before_anything_is_opened(tmp_path):
    with pytest.raises(
        UserError, match="--protocol: harsh: unknown protocol; choose one of hard, soft, published, rd3"
    ):
        evaluate_protocol(tmp_path / "none.safetensors", "harsh")


def test_a_file_without_its_run_or_with_other_data_is_refused(folder, tmp_path):
    shutil.copy(folder / "distilled.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match=r"trust\.safetensors is not beside the file"):
        evaluate_protocol(tmp_path / "alone.safetensors", "hard")
    distilled = artifact.load(folder)
    other = replace(distilled, data=distilled.data | {"fingerprint": "0" * 32})
    with pytest.raises(UserError, match="training images or labels have changed"):
        open_trusted_view(other, folder, CPU)
    with pytest.raises(UserError, match="needs training images from a path"):
        open_trusted_view(replace(distilled, data={"source": {"format": "python"}}), folder, CPU)


def test_without_the_initial_set_its_row_is_left_out(folder, tmp_path, make_run):
    run = make_run("hard")
    assert "initial" not in image_sets(run.distilled, run.samples, tmp_path, 0)
    assert isinstance(run.teacher, type(None))
    assert isinstance(make_run("soft").teacher, Teacher)
