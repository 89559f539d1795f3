"""Generative synthesis of a few images: its result, its errors, and its resume after a kill."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tadperf.config import Config, DiffusionConfig
from tadperf.config.merge import merge
from tadperf.errors import UserError
from tadperf.pipeline.prepare import prepare
from tadperf.progress import silent
from tadperf.refine import networks, rounds, select
from tadperf.refine.checks import check_refine_config
from tadperf.refine.context import RefineContext
from tadperf.refine.detector import DetectorOutput
from tadperf.refine.loop import RefinedImages, refine
from tadperf.refine.models import unet
from tadperf.refine.models.base import DiffusionModel
from tadperf.refine.rounds import make_candidates, replace_anomalies
from tadperf.run.folder import Run
from tadperf.task.samples import normalise_data, select_samples, training_samples

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {
    "device": "cpu",
    "data.noise": "none",
    "match.ipc": 2,
    "detector.depth": 1,
    "detector.width": 8,
    "detector.epochs": 2,
    "refine.steps": 4,
    "refine.rounds": 2,
    "refine.candidates": 3,
    "refine.top_k": 2,
    "refine.beta": 0.6,
    "diffusion.width": 8,
    "diffusion.iterations": 3,
    "diffusion.batch": 8,
}


def config(**values: Any) -> Config:
    given = {name.replace("__", "."): value for name, value in values.items()}
    return merge("digits", None, [f"{name}={json.dumps(value)}" for name, value in (TINY | given).items()])


def run_refinement(folder: Path, resume: bool = False, **values: Any) -> RefinedImages:
    task = prepare(config(**values))
    data = normalise_data(task)
    samples = training_samples(data, select_samples(task, torch.arange(len(task.train)), task.train.labels))
    with Run.create(folder, task.config, resume) as run:
        return refine(task, data, samples, run)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, RefinedImages]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run_refinement(folder)


def test_the_result_and_its_records(finished):
    folder, result = finished
    assert (result.images.dtype, tuple(result.images.shape)) == (torch.float32, (20, 1, 8, 8))
    assert result.labels.tolist() == [c for c in range(10) for _ in range(2)]
    report = result.report
    assert report["detector"]["held_out"] > 0.5
    assert (folder / "refined.png").exists()
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in r.items() if k not in ("stage", "step")} for r in logged if r["stage"] == "refine"]
    assert records == report["rounds"]
    assert 1 < len(records) <= 3
    assert records[0]["anomaly_rate"] == records[0]["anomalous"] / 20 > 0
    counts = [r["anomalous"] for r in records]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]
    assert records[-1]["agreement"] >= records[0]["agreement"]
    assert set(json.loads((folder / "stages.json").read_text())) == {"detector", "diffusion", "refine"}


def test_the_last_record_describes_the_images(finished):
    folder, result = finished
    task = prepare(config())
    data = normalise_data(task)
    with Run.create(folder, task.config, resume=True) as run:
        samples = training_samples(data, select_samples(task, torch.arange(len(task.train)), task.train.labels))
        detector, _ = networks.get_detector(RefineContext(task, data, samples, run, silent))
    logits = detector(result.images)
    flagged = select.is_anomalous(logits, result.labels, 0.6)
    assert int(flagged.sum()) == result.report["rounds"][-1]["anomalous"]


def test_a_run_killed_in_a_round_resumes_to_the_same_result(finished, tmp_path, monkeypatch):
    _, result = finished
    folder, save_state = tmp_path / "run", rounds.save_state

    def killed(path, state):
        save_state(path, state)
        if len(state.records) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run_refinement(folder)
    monkeypatch.setattr(rounds, "save_state", save_state)
    monkeypatch.setattr(networks, "train_detector", None)  # a finished stage is not repeated
    resumed = run_refinement(folder, resume=True)
    assert torch.equal(resumed.images, result.images)
    assert resumed.report["rounds"] == result.report["rounds"]


def test_other_sources_soft_labels_and_no_rounds(tmp_path):
    folder = tmp_path / "checkpoint"
    model = unet.build(DiffusionConfig(width=8), (1, 8, 8), 10, 0)
    unet.save(folder, model, unet.schedulers()[1])
    values = {"refine__source": str(folder), "refine__rounds": 0}
    result = run_refinement(tmp_path / "run", refine__soft_labels=True, refine__prototypes="pixels", **values)
    assert (result.labels.dtype, tuple(result.labels.shape)) == (torch.float32, (20, 10))
    assert len(result.report["rounds"]) == 1
    assert not (tmp_path / "run" / "diffusion").exists()


def test_guidance_changes_the_images_and_repeats_its_bytes(finished, tmp_path):
    values = {"refine__attraction": 0.3, "refine__repulsion": 0.3, "refine__rounds": 1}
    first, again = (run_refinement(tmp_path / name, **values) for name in ("first", "again"))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.first[0], finished[1].first[0])


def test_guidance_compares_with_random_confirmed_images(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "PER_CLASS", 4)
    task = prepare(config())
    data = normalise_data(task)
    confirmed = torch.ones(len(task.train), dtype=torch.bool)
    confirmed[(task.train.labels == 3).nonzero()[2:, 0]] = False
    selection = select_samples(task, torch.arange(len(task.train)), task.train.labels)
    samples = training_samples(data, dataclasses.replace(selection, confirmed=confirmed))
    with Run.create(tmp_path / "run", task.config) as run:
        context = RefineContext(task, data, samples, run, silent)
        images, labels = networks.guidance_images(context)
    known = int(samples.confirmed[samples.labels == 3].sum())
    assert known <= 2
    assert torch.bincount(labels, minlength=10).tolist() == [4, 4, 4, known, 4, 4, 4, 4, 4, 4]
    certain = context.pixels((context.certain_labels == 0).nonzero()[:, 0])
    for image in images[labels == 0]:
        assert bool((certain == image).flatten(1).all(1).any())


def test_a_model_of_other_classes_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    model = unet.build(DiffusionConfig(width=8), (1, 8, 8), 7, 0)
    unet.save(tmp_path / "checkpoint", model, unet.schedulers()[1])
    monkeypatch.setattr(networks, "train_detector", None)
    with pytest.raises(UserError, match="the model has 7 classes, the data have 10"):
        run_refinement(tmp_path / "run", refine__source=str(tmp_path / "checkpoint"))


def detector_output(*rows: tuple[float, ...]) -> DetectorOutput:
    logits = torch.tensor(rows).log()
    return DetectorOutput(logits, torch.eye(len(rows), 4))


def test_only_anomalies_are_replaced_and_never_by_something_worse():
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    candidates = torch.arange(1, 5, dtype=torch.uint8).view(2, 2, 1, 1, 1).expand(-1, -1, 1, 2, 2)
    output = detector_output((0.9, 0.1), (0.5, 0.5), (0.6, 0.4))
    flagged, labels = torch.tensor([False, True, True]), torch.tensor([0, 1, 1])
    candidate_output = detector_output(
        (0.1, 0.9), (0.9, 0.1), (0.7, 0.3), (0.8, 0.2)
    )  # no candidate of the third image is as good
    c = config(refine__beta=0.7).refine
    after = replace_anomalies(images, labels, output, flagged, candidates, candidate_output, c)
    assert after[:, 0, 0, 0].tolist() == [0, 1, 0]
    assert images.max() == 0


def test_candidates_share_the_prototype_of_their_image_with_new_seeds_and_more_noise_each_round():
    requests: list[tuple[float, int, float]] = []
    used_seeds: set[int] = set()

    def denoise(prototypes, labels, image_seeds, strength):
        requests.extend(
            (p, label, strength) for p, label in zip(prototypes[:, 0].tolist(), labels.tolist(), strict=True)
        )
        used_seeds.update(image_seeds)
        return torch.zeros(len(prototypes), 1, 2, 2, dtype=torch.uint8)

    model = DiffusionModel(lambda x: x, denoise)
    c = config(refine__batch=6, refine__strength=0.5, refine__reach=0.75)
    prototypes, labels = torch.arange(4.0)[:, None], torch.tensor([0, 0, 1, 1])
    flagged = torch.tensor([False, True, False, True])
    context: Any = SimpleNamespace(config=c.refine, labels=labels, task=SimpleNamespace(config=c), progress=silent)
    candidates = [make_candidates(context, model, prototypes, flagged, number) for number in (0, 1)]
    assert tuple(candidates[0].shape) == (2, 3, 1, 2, 2)
    expected = ([(1.0, 0, strength)] * 3 + [(3.0, 1, strength)] * 3 for strength in (0.625, 0.75))
    assert requests == [request for group in expected for request in group]
    assert len(used_seeds) == 12


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"refine__top_k": 4}, "refine.top_k: 4: must not be above refine.candidates = 3"),
        ({"refine__prompt": "a photo"}, "refine.prompt: a photo: must contain {name}"),
        ({"refine__strength": 0.2}, "refine.strength: 0.2: is less than one of refine.steps = 4 steps"),
        ({"refine__reach": 0.2}, "refine.reach: 0.2: must not be below refine.strength = 0.3"),
        ({"refine__source": "/nowhere"}, "refine.source: /nowhere: no such folder"),
        ({"refine__beta": 1.5}, "refine.beta: 1.5: must be at most 1"),
        ({"refine__beta": -0.1}, "refine.beta: -0.1: must be at least 0"),
        ({"diffusion__width": 12}, "diffusion.width: 12: must be a multiple of 8"),
    ],
)
def test_config_mistakes_are_refused_before_anything_is_computed(values, words):
    with pytest.raises(UserError) as refused:
        check_refine_config(config(**values))
    assert str(refused.value).startswith(words)
