"""Runs with match.method = tgdd: the whole pipeline, resumed runs, shared experts; the estimate, also of infmatch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tadperf import artifact
from tadperf.errors import UserError
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.estimate import estimate_distill
from tadperf.pipeline.prepare import prepare
from tadperf.run.folder import Run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("soft", "factor"), [(False, 1), (True, 1), (True, 3)], ids=["hard", "soft", "soft, small images"]
)
def test_feature_matching_runs_and_a_resumed_run_ends_with_the_same_bytes(tiny_config, tmp_path, soft, factor):
    values = {"match__soft_labels": soft, "match__lr_img": 1.0, "match__factor": factor, "trust__mode": "on"}
    config = tiny_config(match__method="tgdd", **values)
    task = prepare(config)

    def run(place: Path, resume: bool = False, stop: bool = False) -> bytes:
        def progress(stage: str, done: int, total: int, **_: object) -> None:
            if stop and stage == "matching" and done == 3:
                raise KeyboardInterrupt

        with Run.create(place, config, resume) as opened:
            result = distill_task(task, opened, progress, evaluate=False)
        assert result["method"] == "tgdd"
        assert result.get("factor", 1) == factor
        return (place / "distilled.safetensors").read_bytes()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=True)
    assert run(tmp_path / "cut", resume=True) == whole
    learned, initial = (
        artifact.load(tmp_path / "whole" / name)
        for name in ("distilled.safetensors", "checkpoints/initial.safetensors")
    )
    assert not torch.equal(learned.images, initial.images)
    assert learned.labels.is_floating_point() == soft
    assert (len(learned.images), learned.ipc) == (10 * config.match.ipc * factor**2, config.match.ipc)
    assert [made.stored is not None and made.stored.shape[-1] for made in (learned, initial)] == [factor > 1 and 3] * 2
    assert learned.lr == pytest.approx(config.match.lr_init)


def test_wrong_settings_are_refused_before_any_work(tiny_config):
    with pytest.raises(UserError, match="tgdd has no inner steps"):
        prepare(tiny_config(match__method="tgdd", match__gradient="unroll"))
    with pytest.raises(UserError, match="use at least 10"):
        prepare(tiny_config(match__method="tgdd", match__batch=5))
    with pytest.raises(UserError, match=r"match\.factor: 2: needs synthesis=matching; with synthesis=hybrid use 1"):
        prepare(tiny_config(match__factor=2, synthesis="hybrid"))
    with pytest.raises(UserError, match=r"match\.factor=8 needs 640; use at most 1,"):
        prepare(tiny_config(match__factor=8, match__ipc=10, trust__mode="off"))


@pytest.mark.parametrize(("method", "passes"), [("tgdd", 1), ("infmatch", 9)])
def test_the_estimate_counts_the_real_side_of_a_snapshot(tiny_config, monkeypatch, method, passes):
    monkeypatch.setattr("tadperf.pipeline.probes.matching_seconds", lambda *_: 0.0)
    monkeypatch.setattr("tadperf.pipeline.estimate._Estimate.student", lambda *_, **__: 0.0)
    task = prepare(tiny_config(match__method=method, trust__mode="off"))
    monkeypatch.setattr("tadperf.pipeline.probes.testing_seconds", lambda *_: 0.5)  # of one image
    kept = len(task.train) * (1 - task.config.data.holdout)
    snapshots = 2  # of one expert: max_start is 1
    found = estimate_distill(task)["stages"]["matching"]
    assert found == pytest.approx(passes * snapshots * kept * 0.5, rel=0.02)
