"""Generative synthesis as a whole, in small: what it gives, what it refuses, and that a kill changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tadperf.config import Config, DiffusionConfig
from tadperf.config.merge import merge
from tadperf.errors import UserError
from tadperf.pipeline.prepare import prepare
from tadperf.refine import detector, loop, select
from tadperf.refine.checks import check_refine_config
from tadperf.refine.detector import DetectorOutput
from tadperf.refine.loop import RefinedImages, get_detector, make_candidates, refine, replaced
from tadperf.refine.models import unet
from tadperf.refine.models.base import DiffusionModel
from tadperf.run.folder import Run
from tadperf.task.samples import normalise_data, select_samples, training_samples

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {
    "device": "cpu", "data.noise": "none", "match.ipc": 2,
    "detector.depth": 1, "detector.width": 8, "detector.epochs": 2, "refine.steps": 4,
    "refine.rounds": 2, "refine.candidates": 3, "refine.top_k": 2, "refine.beta": 0.6, "diffusion.width": 8,
    "diffusion.iterations": 3, "diffusion.batch": 8,
}  # fmt: skip


def config(**values: Any) -> Config:
    given = {name.replace("__", "."): value for name, value in values.items()}
    return merge("digits", None, [f"{name}={json.dumps(value)}" for name, value in (TINY | given).items()])


def made(place: Path, resume: bool = False, **values: Any) -> RefinedImages:
    task = prepare(config(**values))
    data = normalise_data(task)
    seen = training_samples(data, select_samples(task, torch.arange(len(task.train)), task.train.labels))
    with Run.create(place, task.config, resume) as run:
        return refine(task, data, seen, run)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, RefinedImages]:
    place = tmp_path_factory.mktemp("whole") / "run"
    return place, made(place)


def test_what_it_gives(whole):
    place, result = whole
    assert (result.images.dtype, tuple(result.images.shape)) == (torch.float32, (20, 1, 8, 8))
    assert result.labels.tolist() == [c for c in range(10) for _ in range(2)]
    report = result.report
    assert report["detector"]["held_out"] > 0.5
    assert Path(report["picture"]).exists()
    logged = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    rounds = [{k: v for k, v in r.items() if k not in ("stage", "step")} for r in logged if r["stage"] == "refine"]
    assert rounds == report["rounds"]
    assert 1 < len(rounds) <= 3
    assert rounds[0]["anomaly_rate"] == rounds[0]["anomalous"] / 20 > 0
    counts = [r["anomalous"] for r in rounds]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]
    assert rounds[-1]["agreement"] >= rounds[0]["agreement"]
    assert set(json.loads((place / "stages.json").read_text())) == {"detector", "diffusion", "refine"}


def test_the_last_record_is_true_of_the_images(whole):
    place, result = whole
    task = prepare(config())
    data = normalise_data(task)
    with Run.create(place, task.config, resume=True) as run:
        seen = training_samples(data, select_samples(task, torch.arange(len(task.train)), task.train.labels))
        detector, _ = get_detector(task, seen, run, lambda *_, **__: None)
    logits = detector(result.images)
    flagged = select.anomalous(logits, result.labels, 0.6)
    assert int(flagged.sum()) == result.report["rounds"][-1]["anomalous"]


def test_one_seed_gives_one_result_and_a_kill_changes_nothing(whole, tmp_path, monkeypatch):
    _, result = whole
    place, save = tmp_path / "run", loop.save

    def killed(path, state):
        save(path, state)
        if len(state.records) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        made(place)
    monkeypatch.setattr(loop, "save", save)
    monkeypatch.setattr(detector, "train", None)  # what was finished is not done again
    again = made(place, resume=True)
    assert torch.equal(again.images, result.images)
    assert again.report["rounds"] == result.report["rounds"]


def test_other_sources_soft_labels_and_no_rounds(tmp_path):
    folder = tmp_path / "checkpoint"
    model = unet.build(DiffusionConfig(width=8), (1, 8, 8), 10, 0)  # pyright: ignore[reportCallIssue]
    unet.save(folder, model, unet.schedulers()[1])
    values = {"refine__source": str(folder), "refine__rounds": 0}
    result = made(tmp_path / "run", refine__soft_labels=True, refine__prototypes="pixels", **values)
    assert (result.labels.dtype, tuple(result.labels.shape)) == (torch.float32, (20, 10))
    assert len(result.report["rounds"]) == 1
    assert not (tmp_path / "run" / "diffusion").exists()


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    model = unet.build(DiffusionConfig(width=8), (1, 8, 8), 7, 0)  # pyright: ignore[reportCallIssue]
    unet.save(tmp_path / "checkpoint", model, unet.schedulers()[1])
    monkeypatch.setattr(detector, "train", None)
    with pytest.raises(UserError, match="knows 7 classes, the data have 10"):
        made(tmp_path / "run", refine__source=str(tmp_path / "checkpoint"))


def verdicts(*rows: tuple[float, ...]) -> DetectorOutput:
    logits = torch.tensor(rows).log()
    return DetectorOutput(logits, torch.eye(len(rows), 4))


def test_only_anomalies_are_replaced_and_never_by_something_worse():
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    candidates = torch.arange(1, 5, dtype=torch.uint8).view(2, 2, 1, 1, 1).expand(-1, -1, 1, 2, 2)
    verdict = verdicts((0.9, 0.1), (0.5, 0.5), (0.6, 0.4))
    flagged, labels = torch.tensor([False, True, True]), torch.tensor([0, 1, 1])
    said = verdicts((0.1, 0.9), (0.9, 0.1), (0.7, 0.3), (0.8, 0.2))  # no candidate of the third image is as good
    c = config(refine__beta=0.7).refine
    after = replaced(images, labels, verdict, flagged, candidates, said, c)
    assert after[:, 0, 0, 0].tolist() == [0, 1, 0]
    assert images.max() == 0


def test_candidates_take_their_own_seeds_the_prototype_of_their_image_and_more_noise_each_round():
    asked: list[tuple[float, int, float]] = []
    drawn: set[int] = set()

    def denoise(prototypes, labels, image_seeds, strength):
        asked.extend((p, label, strength) for p, label in zip(prototypes[:, 0].tolist(), labels.tolist(), strict=True))
        drawn.update(image_seeds)
        return torch.zeros(len(prototypes), 1, 2, 2, dtype=torch.uint8)

    source, c = (
        DiffusionModel(lambda x: x, denoise),
        config(refine__batch=6, refine__strength=0.5, refine__reach=0.75).refine,
    )
    starts, labels = torch.arange(4.0)[:, None], torch.tensor([0, 0, 1, 1])
    flagged = torch.tensor([False, True, False, True])
    made = [make_candidates(source, starts, labels, flagged, c, 0, n, lambda *_, **__: None) for n in (0, 1)]
    assert tuple(made[0].shape) == (2, 3, 1, 2, 2)
    rounds = ([(1.0, 0, strength)] * 3 + [(3.0, 1, strength)] * 3 for strength in (0.625, 0.75))
    assert asked == [one for of_round in rounds for one in of_round]
    assert len(drawn) == 12


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"refine__top_k": 4}, "refine.top_k: 4: must not be above refine.candidates = 3"),
        ({"refine__prompt": "a photo"}, "refine.prompt: a photo: must hold {name}"),
        ({"refine__strength": 0.2}, "refine.strength: 0.2: leaves no step of refine.steps = 4"),
        ({"refine__reach": 0.2}, "refine.reach: 0.2: must not be below refine.strength = 0.3"),
        ({"refine__source": "/nowhere"}, "refine.source: /nowhere: there is no such folder"),
        ({"refine__beta": 1.5}, "refine.beta: 1.5: must be less than or equal to 1"),
        ({"refine__beta": -0.1}, "refine.beta: -0.1: must be greater than or equal to 0"),
        ({"diffusion__width": 12}, "diffusion.width: 12: must be a multiple of 8"),
    ],
)
def test_what_is_refused_before_anything_is_computed(values, words):
    with pytest.raises(UserError) as refused:
        check_refine_config(config(**values))
    assert str(refused.value).startswith(words)
