"""Small runs refuse wrong input, write all their files, and give equal bytes for equal seeds."""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tadperf import artifact
from tadperf.bench.tools import kill_resume
from tadperf.compute.workers import available_cores
from tadperf.config import Config
from tadperf.config.merge import merge
from tadperf.errors import UserError
from tadperf.experts.store import Experts
from tadperf.matching.state import load_checkpoint
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.pipeline import matching
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.evaluate import evaluate_file
from tadperf.pipeline.experts import train_shared_experts
from tadperf.pipeline.matching import starting_state
from tadperf.pipeline.package import INITIAL
from tadperf.pipeline.prepare import prepare
from tadperf.run.folder import Run
from tadperf.task.samples import normalise_data, select_samples, training_samples

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {
    "data.path": "digits",
    "device": "cpu",
    "net.width": 4,
    "net.depth": 1,
    "experts.count": 2,
    "experts.epochs": 2,
    "match.ipc": 1,
    "match.iterations": 6,
    "match.check_every": 3,
    "match.steps": 2,
    "match.max_start": 1,
    "match.expert_epochs": 1,
    "match.init": "real",
    "evaluate.epochs": 2,
    "evaluate.repeats": 1,
    "evaluate.full_epochs": 1,
    "evaluate.full_repeats": 1,
    "trust.rounds": 2,
    "trust.proxies": 2,
    "trust.epochs": 2,
}


def config(**values: Any) -> Config:
    """Returns the tiny config with the fields `section__key=value`."""
    given = {name.replace("__", "."): value for name, value in values.items()}
    return merge("digits", None, [f"{name}={json.dumps(value)}" for name, value in (TINY | given).items()])


def run(place: Path, **values: Any) -> dict[str, Any]:
    task = prepare(config(**values))
    with Run.create(place, task.config) as opened:
        return distill_task(task, opened)


def distilled(place: Path) -> bytes:
    return (place / "distilled.safetensors").read_bytes()


def save(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8), test: bool = True, **more: Any) -> str:
    """Writes 60 grey images of three classes that differ in brightness. seed: the seed of the test split."""

    def split(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng, labels = np.random.default_rng(seed), np.arange(count) % 3
        return (rng.integers(0, 120, (count, *size)) + 60 * labels[:, None, None]).astype(np.uint8), labels

    arrays: dict[str, Any] = dict(zip(("x_train", "y_train"), split(60, 99), strict=True))
    if test:
        arrays |= dict(zip(("x_test", "y_test"), split(30, seed), strict=True))
    np.savez(path, **arrays | more)
    return str(path)


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"match__ipc": 200}, "--ipc", ["class '", "samples to start from"]),
        ({"net__norm": "batch"}, "net.norm", ["running statistics"]),
        ({"net__name": "resnet18bn"}, "net.name", ["running statistics", "use resnet18"]),
        ({"experts__epochs": 1}, "experts.epochs", ["= 2"]),
        ({"match__min_start": 2}, "match.min_start", ["2", "match.max_start = 1"]),
        ({"data__augment": "crop_zoom"}, "data.augment", ["'zoom'", "rotate"]),
        ({"data__noise": "symmetric:1.5"}, "--noise", ["1.5", "below 1"]),
        ({"data__path": "nowhere.npz"}, "data", ["no such file"]),
    ],
)
def test_wrong_configs_are_refused(values, field, words):
    with pytest.raises(UserError) as refused:
        prepare(config(**values))
    assert refused.value.field == field
    for word in words:
        assert word in str(refused.value)


def test_wrong_data_are_refused(tmp_path):
    def refused(**values: Any) -> str:
        with pytest.raises(UserError) as caught:
            prepare(config(**values))
        return str(caught.value)

    assert len(prepare(config(data__path=save(tmp_path / "a.npz", test=False))).test) == 12  # a test split is made
    assert "8 x 6" in refused(data__path=save(tmp_path / "b.npz", size=(8, 6)))
    assert "--image-size" in refused(data__path=save(tmp_path / "b.npz", size=(8, 6)))
    assert refused(data__path=save(tmp_path / "c.npz"), data__holdout=0.01).startswith("data.holdout: 0.01: ")
    labels = np.array([0] * 30 + [1] * 27 + [2] * 3)
    rare = save(tmp_path / "d.npz", y_train=labels, class_names=np.array(["ant", "bee", "cat"]))
    assert refused(data__path=rare, data__noise="none", match__ipc=5).startswith(
        "--ipc: 5: class 'cat' has only 3 samples"
    )
    assert prepare(config(data__path=rare, data__noise="none", match__ipc=3)).train.labels.tolist()[-3:] == [
        2,
        2,
        2,
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of a finished run and its result."""
    place = tmp_path_factory.mktemp("whole") / "run"
    return place, run(place)


def test_a_run_writes_all_its_files(whole):
    place, result = whole
    assert set(result) == {
        "data",
        "ipc",
        "seed",
        "synthesis",
        "method",
        "trust",
        "accuracy",
        "baselines",
        "ladder",
        "lr",
        "stages",
        "seconds",
        "device",
        "paths",
    }
    assert json.loads((place / "result.json").read_text()) == result
    assert (result["data"]["train"], result["data"]["test"], result["data"]["shape"]) == (1400, 397, [1, 8, 8])
    assert set(result["accuracy"]) == {"convnet"}
    assert set(result["baselines"]) == {
        "initial",
        "initial_hard",
        "random_real",
        "random_given",
        "full_data",
        "full_trusted",
    }
    assert set(result["stages"]) == {"data", "trust", "experts", "matching", "evaluate"}
    assert result["seconds"] == pytest.approx(sum(stage["seconds"] for stage in result["stages"].values()))
    for path in result["paths"].values():
        assert Path(path).exists()
    written = {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.is_file() and file.name != ".lock"}
    assert max(written.values()) == written[place / "DONE"]
    records = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    stages = [record["stage"] for record in records]
    assert (stages.count("trust"), stages.count("matching"), stages.count("evaluate")) == (2, 6 + 2, 7)
    stopped = [record.get("stopped") for record in records if record["stage"] == "trust"]
    assert stopped == [None, "trust.rounds is 2"]
    synthetic = artifact.load(place / "distilled.safetensors")
    assert (synthetic.ipc, synthetic.num_classes, synthetic.shape) == (1, 10, (1, 8, 8))
    again = evaluate_file(place / "distilled.safetensors", device="cpu")
    assert again["accuracy"] == result["accuracy"]  # `evaluate` needs only the file


def test_one_seed_gives_one_result(whole, tmp_path):
    place, result = whole
    same = run(tmp_path / "same", experts__workers=1)
    assert distilled(tmp_path / "same") == distilled(place)
    assert (same["accuracy"], same["baselines"]) == (result["accuracy"], result["baselines"])
    run(tmp_path / "other", seed=1)
    ours, other = (artifact.load(folder / "distilled.safetensors") for folder in (place, tmp_path / "other"))
    assert (ours.images - other.images).abs().max() > 0.1


def test_clean_labels_and_test_data_do_not_change_the_result(tmp_path):
    """A file with other clean labels, or with other test images and labels, gives the same bytes."""
    path, clean = tmp_path / "set.npz", np.arange(60) % 3
    values = {"data__path": str(path), "data__noise": "symmetric:0.3", "match__init": "kmeans"}
    save(path, clean_labels=clean)
    first = run(tmp_path / "a", **values)
    save(path, clean_labels=np.random.default_rng(3).permutation(clean))
    second = run(tmp_path / "b", **values)
    assert distilled(tmp_path / "a") == distilled(tmp_path / "b")
    assert (first["accuracy"], first["baselines"], first["data"]) == (
        second["accuracy"],
        second["baselines"],
        second["data"],
    )
    save(path, seed=1, y_test=(np.arange(30) + 1) % 3, clean_labels=clean)
    third = run(tmp_path / "c", **values)
    assert distilled(tmp_path / "a") == distilled(tmp_path / "c")
    assert third["baselines"]["full_data"] != first["baselines"]["full_data"]  # the test data did change


@pytest.mark.parametrize("kind", ["generative", "hybrid"])
def test_images_of_a_diffusion_model(tmp_path, kind):
    """Generative runs return the images. Hybrid runs start matching from them."""
    values = {
        "synthesis": kind,
        "data__noise": "none",
        "detector__depth": 1,
        "detector__width": 8,
        "detector__epochs": 2,
        "diffusion__width": 8,
        "diffusion__iterations": 3,
        "diffusion__batch": 8,
        "refine__steps": 4,
        "refine__rounds": 1,
        "refine__candidates": 2,
        "refine__top_k": 1,
    }
    result = run(tmp_path / "run", **values)
    assert result["synthesis"] == kind
    synthetic, initial = (artifact.load(tmp_path / "run" / name) for name in ("distilled.safetensors", INITIAL))
    assert torch.equal(synthetic.images, initial.images) == (kind == "generative")
    assert synthetic.labels.is_floating_point() == (kind == "hybrid")  # matching learns soft labels
    assert ("matching" in result["stages"], "refine" in result["stages"]) == (kind == "hybrid", True)
    record = json.loads((tmp_path / "run" / "refined.json").read_text())
    assert {"source", "detector", "rounds"} <= set(record)


def test_a_run_can_use_shared_experts(whole, tmp_path):
    task = prepare(config())
    with Run.create(tmp_path / "experts", task.config) as opened:
        result = train_shared_experts(task, opened)
    assert (result["experts"], result["snapshots"]) == (2, 3)
    run(tmp_path / "run", experts__path=str(tmp_path / "experts"))
    assert distilled(tmp_path / "run") == distilled(whole[0])
    assert not (tmp_path / "run" / "experts").exists()


@pytest.mark.parametrize("method", ["ftd", "datm"])
def test_ftd_and_datm_run_and_share_no_experts_with_mtt(whole, tmp_path, method):
    values = {"match__method": method, "match__ema": 0.5}
    result = run(tmp_path / "run", **values)
    assert result["method"] == method
    synthetic, plain = (artifact.load(place / "distilled.safetensors") for place in (tmp_path / "run", whole[0]))
    assert not (synthetic.images == plain.images).all()
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "matching.safetensors", torch.device("cpu"))[2]
    assert torch.equal(synthetic.images, state.average)  # the average is kept, not the last images
    assert not torch.equal(state.average, state.images)
    with pytest.raises(UserError, match=r"its experts have rho = 0\.0, this run needs 0\.01"):
        prepare(config(experts__path=str(whole[0]), **values))
    other = prepare(config(experts__path=str(tmp_path / "run"), **values, match__steps=3))
    assert other.config.experts.rho == 0.01


def test_datm_starts_from_samples_that_an_expert_classifies_correctly(whole, tmp_path, monkeypatch):
    """If every other sample is classified correctly, both values of match.init choose only those."""
    task = prepare(config(match__method="datm"))
    selection = select_samples(task, torch.arange(len(task.train)), task.train.labels)
    samples = training_samples(normalise_data(task), selection)
    mask = torch.arange(len(samples.labels)) % 2 == 0
    monkeypatch.setattr(matching, "correctly_classified", lambda *_: mask)
    net = FlatNet(build(task.config.net, task.train.shape, 10, 0))
    experts = Experts.open(whole[0] / "experts", 2)
    for init in ("real", "kmeans"):
        chosen = task.config.match.model_copy(update={"init": init, "ipc": 3})
        init_task = replace(task, config=task.config.model_copy(update={"match": chosen}))
        images = starting_state(init_task, samples, net, experts).images
        equal = (samples.images[torch.arange(len(mask))][:, None] == images[None]).flatten(2).all(2)
        chosen_index = equal.nonzero()[:, 0]
        assert len(chosen_index) >= 30
        assert mask[chosen_index].all()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[float, Path]:
    """Returns the seconds and the folder of an undisturbed run by the command line."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return kill_resume.finish("matching", folder), folder


def test_killed_runs_end_with_the_same_bytes(undisturbed, tmp_path):
    duration, folder = undisturbed
    times = kill_resume.moments(4, duration, seed=0)
    stages = [kill_resume.kill("matching", tmp_path / "run", moment) for moment in times]
    kill_resume.finish("matching", tmp_path / "run")
    assert stages[0] != "ended before the signal", stages
    assert kill_resume.differences(tmp_path / "run", folder) == []


def test_interrupted_runs_end_with_an_error_code_and_the_same_bytes(undisturbed, tmp_path):
    """kill_resume.kill raises RuntimeError if a run that is not done ends with exit code 0."""
    duration, folder = undisturbed
    for number, share in ((signal.SIGINT, 0.3), (signal.SIGTERM, 0.5), (signal.SIGHUP, 0.7)):
        kill_resume.kill("matching", tmp_path / "run", share * duration, number)
    kill_resume.finish("matching", tmp_path / "run")
    assert kill_resume.differences(tmp_path / "run", folder) == []


def test_an_interrupt_while_students_train_in_the_background(tmp_path):
    """The students end with the run, and their scores so far are not lost."""
    values = {"match__iterations": 40, "match__check_every": 20, "evaluate__epochs": 30, "evaluate__repeats": 3}
    whole = run(tmp_path / "whole", **values)
    task, children_seen = prepare(config(**values)), []

    def interrupt(stage: str, done: int, total: int, **_: Any) -> None:
        if stage == "matching" and done > 1:
            children_seen.append(multiprocessing.active_children())
            time.sleep(0.02)
            if done >= 30:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Run.create(tmp_path / "run", task.config) as opened:
        distill_task(task, opened, interrupt)
    if sys.platform.startswith("linux") and available_cores() > 1:
        assert any(children_seen)
    assert not any(child.is_alive() for children in children_seen for child in children)
    with Run.create(tmp_path / "run", task.config, resume=True) as opened:
        again = distill_task(task, opened)
    assert distilled(tmp_path / "run") == distilled(tmp_path / "whole")
    assert (again["accuracy"], again["baselines"]) == (whole["accuracy"], whole["baselines"])
