"""The ladder: its rows, its gains, and its numbers in a run."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tadperf import artifact
from tadperf.pipeline import scoring
from tadperf.pipeline.context import open_context
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.ladder import ladder
from tadperf.pipeline.package import INITIAL
from tadperf.pipeline.prepare import prepare
from tadperf.report.words import gain
from tadperf.run.folder import Run

pytestmark = pytest.mark.usefixtures("one_thread")
SCORES = {
    "convnet": [0.90, 0.92],
    "initial": [0.86, 0.88],
    "random_real": [0.70, 0.74],
    "full_data": [0.95],
    "full_trusted": [0.97],
    "random_given": [0.50, 0.52],
    "initial_hard": [0.75, 0.71],
}


def test_each_rung_holds_the_gain_over_the_rung_below():
    rungs = ladder(SCORES, "convnet")
    assert [(rung["rung"], rung["row"]) for rung in rungs] == [
        ("given", "random_given"),
        ("trusted", "random_real"),
        ("selected", "initial_hard"),
        ("labelled", "initial"),
        ("distilled", "convnet"),
        ("all", "full_trusted"),
    ]
    assert "gain" not in rungs[0]
    for below, rung in itertools.pairwise(rungs):
        assert rung["gain"] == pytest.approx(statistics.fmean(rung["runs"]) - statistics.fmean(below["runs"]))
    variances = [statistics.variance(SCORES[row]) for row in ("random_given", "random_real")]
    assert rungs[1]["deviation"] == pytest.approx(math.sqrt(sum(variances)))
    assert [rung["clear"] for rung in rungs[1:]] == [True, False, True, True, None]  # "all" has a single run
    assert [gain(rung) for rung in rungs[:4]] == ["", "+21.0", "+1.0 (no clear gain)", "+14.0"]


def test_rows_that_were_not_measured_have_no_rung():
    hard_labels = {row: runs for row, runs in SCORES.items() if row not in ("initial_hard", "random_given")}
    assert [rung["rung"] for rung in ladder(hard_labels, "convnet")] == ["trusted", "selected", "distilled", "all"]
    without_trust = {row: runs for row, runs in hard_labels.items() if row != "full_trusted"}
    assert ladder(without_trust, "convnet")[-1]["row"] == "full_data"
    assert [rung["rung"] for rung in ladder(without_trust, "vgg11")] == ["trusted", "selected", "all"]
    assert ladder({}, "convnet") == []


def run(place: Path, config: Any) -> dict[str, Any]:
    task = prepare(config)
    with Run.create(place, task.config) as opened:
        return distill_task(task, opened)


def test_a_run_holds_its_ladder(tmp_path, tiny_config):
    values = {"match__soft_labels": True, "evaluate__repeats": 4, "trust__mode": "on", "trust__proxies": 2}
    result = run(tmp_path / "run", tiny_config(**values))
    rungs = {rung["rung"]: rung for rung in result["ladder"]}
    assert list(rungs) == ["given", "trusted", "selected", "labelled", "distilled", "all"]
    assert {name: len(rung["runs"]) for name, rung in rungs.items()} == {
        "given": 3,
        "trusted": 4,
        "selected": 3,
        "labelled": 4,
        "distilled": 4,
        "all": 1,
    }
    for rung in rungs.values():
        rows = result["accuracy"] | result["baselines"]
        assert rung["runs"] == rows[rung["row"]]["runs"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What each part adds" in page
    assert "random images, labels as given" in page


def test_without_trust_and_soft_labels_there_are_no_further_students(tmp_path, tiny_config):
    result = run(tmp_path / "run", tiny_config(match__soft_labels=False))
    assert set(result["baselines"]) == {"initial", "random_real", "full_data"}
    assert [rung["rung"] for rung in result["ladder"]] == ["trusted", "selected", "distilled", "all"]


def test_the_rows_of_the_ladder_hold_the_images_and_labels_they_name(tmp_path, tiny_config):
    values = {"match__soft_labels": True, "trust__mode": "oracle", "data__noise": "symmetric:0.5"}
    task = prepare(tiny_config(**values))
    run(tmp_path / "run", tiny_config(**values))
    initial = artifact.load(tmp_path / "run" / INITIAL)
    with Run.create(tmp_path / "context", task.config) as opened:
        context = open_context(task, opened, lambda *_, **__: None)
        students = {s.row: s.make_examples() for s in scoring.baseline_students(context, initial)}
        half = replace(context.selection, index=context.selection.index[: len(task.train) // 2])
        epochs = {s.row: s.recipe.epochs for s in scoring.baseline_students(replace(context, selection=half), initial)}
    assert epochs["full_trusted"] == 2 * epochs["full_data"]  # as many steps
    given, hard = students["random_given"], students["initial_hard"]
    images = given.images[torch.arange(10)]
    index = (context.data.train[torch.arange(len(task.train))][None] == images[:, None]).flatten(2).all(2)
    labels = [task.train.labels[row].tolist() for row in index]  # two images of the digits may be equal
    assert all(int(label) in candidates for label, candidates in zip(given.labels, labels, strict=True))
    assert given.labels.tolist() == list(range(10))
    assert torch.equal(hard.labels, torch.arange(10))
    wrong = replace(initial, labels=-initial.labels)  # the largest logit is not that of the class
    assert not torch.equal(wrong.hard_labels, torch.arange(10))
    assert torch.equal(scoring.class_labels(wrong), torch.arange(10))
    assert torch.equal(torch.as_tensor(hard.images[torch.arange(10)]), initial.images)
