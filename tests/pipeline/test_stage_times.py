"""A killed stage keeps its time up to the last progress."""

from __future__ import annotations

import json
import time
from typing import Any

from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.prepare import prepare
from tadperf.run import folder
from tadperf.run.folder import Run


def saved_stages(run: Run) -> dict[str, Any]:
    file = run.path / "stages.json"
    return json.loads(file.read_text()) if file.exists() else {}


def test_progress_saves_the_time_of_the_stage_every_ten_seconds(tmp_path, tiny_config, monkeypatch):
    calls: list[Any] = []
    with Run.create(tmp_path / "run", tiny_config()) as run:
        progress = run.saving_time(lambda *given, **values: calls.append((*given, values)))
        progress("decode", 1, 1)  # outside of a stage
        with run.stage("evaluate"):
            progress("evaluate", 0, 2, loss=0.5)
            assert saved_stages(run) == {}
            monkeypatch.setattr(folder, "SAVE_STAGES_EVERY", 0.0)
            time.sleep(0.02)
            progress("evaluate", 1, 2)
            assert saved_stages(run)["evaluate"]["seconds"] >= 0.02
    assert calls == [("decode", 1, 1, {}), ("evaluate", 0, 2, {"loss": 0.5}), ("evaluate", 1, 2, {})]


def test_all_stages_of_a_run_save_their_time(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr(folder, "SAVE_STAGES_EVERY", 0.0)
    task = prepare(tiny_config())
    saved: set[str] = set()

    with Run.create(tmp_path / "run", task.config) as run:

        def progress(stage: str, done: int, total: int, **values: object) -> None:
            if stage in saved_stages(run):  # written after an earlier call of this stage
                saved.add(stage)

        distill_task(task, run, progress)
    assert saved == {"data", "experts", "matching", "evaluate"}
