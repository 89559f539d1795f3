"""Starting from another run: which images stay, which files are copied, and which runs are refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tadperf import artifact
from tadperf.config import Config
from tadperf.config.merge import merge
from tadperf.errors import UserError
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.package import INITIAL
from tadperf.pipeline.prepare import prepare
from tadperf.refine import networks, start
from tadperf.refine.rounds import load_state, unchanged_images
from tadperf.run.folder import Run, stored_config
from tadperf.trust.state import TrustState

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {
    "device": "cpu",
    "match.ipc": 2,
    "net.width": 8,
    "net.depth": 1,
    "experts.count": 1,
    "match.iterations": 2,
    "match.steps": 2,
    "match.max_start": 1,
    "match.expert_epochs": 1,
    "match.check_every": 2,
    "evaluate.epochs": 2,
    "trust.rounds": 1,
    "trust.proxies": 2,
    "trust.epochs": 2,
    "detector.depth": 1,
    "detector.width": 8,
    "detector.epochs": 3,
    "refine.steps": 4,
    "refine.rounds": 2,
    "refine.candidates": 3,
    "refine.top_k": 2,
    "refine.beta": 0.6,
    "diffusion.width": 8,
    "diffusion.iterations": 3,
    "diffusion.batch": 8,
}


def distilled(folder: Path, config: Config) -> dict[str, Any]:
    with Run.create(folder, config) as run:
        return distill_task(prepare(config), run, evaluate=False)


@pytest.fixture(scope="module")
def matched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "run"
    distilled(folder, merge("digits", None, (), TINY))
    return folder


@pytest.fixture(scope="module")
def refined(matched) -> Path:
    folder = matched.parent / "refined"
    distilled(folder, start.config_of(matched))
    return folder


def test_accepted_images_stay_and_the_others_are_generated_again(matched, refined):
    before, after = (artifact.load(folder / "distilled.safetensors") for folder in (matched, refined))
    state = load_state(refined / "checkpoints" / "refine.safetensors")
    same = unchanged_images(state)
    assert torch.equal(artifact.load(refined / INITIAL).images, before.images)
    assert torch.equal(after.images[same], before.images[same])
    assert torch.equal(after.labels[same], before.labels[same])  # learned soft labels
    assert 0 < int((~same).sum()) < 20
    assert (after.images[~same] != before.images[~same]).flatten(1).any(1).all()
    assert after.labels.shape == (20, 10)
    assert after.lr == before.lr
    assert (~same).sum() <= state.records[0]["anomalous"]
    assert state.records[-1]["anomalous"] <= state.records[0]["anomalous"]


def test_the_trusted_view_comes_from_the_run(matched, refined):
    first, second = (TrustState.load(folder / "trust.safetensors") for folder in (matched, refined))
    assert torch.equal(first.working, second.working)
    assert (refined / "labels.csv").read_bytes() == (matched / "labels.csv").read_bytes()
    assert not (refined / "trust").exists()


def test_detector_and_diffusion_model_are_copied_if_their_config_is_the_same(refined, tmp_path, monkeypatch):
    from tadperf.refine.models import train

    monkeypatch.setattr(train, "initial_training", None)
    config = start.config_of(refined)
    trained = []
    train_detector = networks.train_detector
    monkeypatch.setattr(networks, "train_detector", lambda *given: trained.append(given) or train_detector(*given))
    distilled(tmp_path / "same", config)
    assert not trained
    own = (refined / "detector.safetensors").read_bytes()
    assert (tmp_path / "same" / "detector.safetensors").read_bytes() == own
    other = config.model_copy(update={"detector": config.detector.model_copy(update={"epochs": 4})})
    distilled(tmp_path / "other", other)
    assert len(trained) == 1
    assert (tmp_path / "other" / "detector.safetensors").read_bytes() != own


def test_a_run_without_images_gets_new_ones(matched, tmp_path):
    shutil.copytree(matched, tmp_path / "killed", ignore=shutil.ignore_patterns("distilled*", "DONE", "result.json"))
    distilled(tmp_path / "made", start.config_of(tmp_path / "killed"))
    assert artifact.load(tmp_path / "made" / "distilled.safetensors").labels.dtype == torch.int64


def refused(folder: Path, tmp_path: Path, config: Config | None = None) -> str:
    with pytest.raises(UserError) as caught:
        distilled(tmp_path / "refused", config or start.config_of(folder))
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "refused", ignore_errors=True)
    return str(caught.value)


def test_runs_that_cannot_be_refined_are_refused(matched, tmp_path):
    assert "config.json is missing" in refused(tmp_path, tmp_path)
    early = tmp_path / "early"
    shutil.copytree(matched, early, ignore=shutil.ignore_patterns("trust.safetensors", "distilled*"))
    assert "it ended before the stage trust; continue it with" in refused(early, tmp_path)
    state = TrustState.load(matched / "trust.safetensors")
    replace(state, given=state.given.flip(0)).save(early / "trust.safetensors")
    assert "its labels differ from the labels of the data" in refused(early, tmp_path)
    verdict = state.verdict.masked_fill(state.working == 3, 3)
    replace(state, verdict=verdict).save(early / "trust.safetensors")
    assert "class '3' has only 0 samples to start from" in refused(early, tmp_path)
    state.save(early / "trust.safetensors")
    distilled_set = artifact.load(matched / "distilled.safetensors")
    replace(distilled_set, data=distilled_set.data | {"fingerprint": "other"}).save(early / "distilled.safetensors")
    assert "its synthetic images were distilled from other data" in refused(early, tmp_path)


def test_only_sections_of_refinement_may_differ(matched):
    before = start.config_of(matched)
    start.refuse_change(before, merge(None, None, ["refine.beta=0.9", "detector.epochs=9"], None, before))
    with pytest.raises(UserError, match=r"match\.ipc: 3: the run to refine used 2"):
        start.refuse_change(before, merge(None, None, ["match.ipc=3"], None, before))
    assert stored_config(matched) != before  # generative, with refine.start set


@pytest.mark.parametrize(("field", "kept"), [("refine.beta=0.9", True), ("seed=1", False)])
def test_a_run_inherits_what_it_would_train_identically(tmp_path, field, kept):
    config = merge("digits", None, (), TINY | {"synthesis": "generative", "match.ipc": 1})
    other = merge("digits", None, [field], TINY | {"synthesis": "generative", "match.ipc": 1})
    distilled(tmp_path / "first", config)
    task, sets = prepare(other), []
    for folder in (tmp_path / "alone", tmp_path / "heir"):
        with Run.create(folder, other) as run:
            if folder.name == "heir":
                start.inherit(tmp_path / "first", task, run)
                assert all((folder / name).exists() == kept for name in ("trust", "diffusion", "detector.safetensors"))
            distill_task(task, run, evaluate=False)
        sets.append((folder / "distilled.safetensors").read_bytes())
    assert sets[0] == sets[1]


def test_nothing_is_inherited_from_an_unfinished_run_or_from_other_samples(tmp_path):
    config = merge("digits", None, (), TINY | {"synthesis": "generative", "match.ipc": 1})
    distilled(tmp_path / "first", config)
    task = prepare(config)
    other = replace(task, train=replace(task.train, images=255 - task.train.images))
    (tmp_path / "first" / "diffusion").rename(tmp_path / "first" / "kept")
    with Run.create(tmp_path / "heir", config) as run:
        start.inherit(tmp_path / "first", other, run)
        assert not (run.path / "trust").exists()
        start.inherit(tmp_path / "first", task, run)
        assert (run.path / "trust").exists()
        assert not (run.path / "diffusion").exists()
    (tmp_path / "first" / "DONE").unlink()
    with Run.create(tmp_path / "late", config) as run:
        start.inherit(tmp_path / "first", task, run)
        assert not (run.path / "trust").exists()
