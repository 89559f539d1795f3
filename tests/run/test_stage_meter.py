"""The time, the peak memory and the operators of a stage, over resumes and kills."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tadperf.config.merge import merge
from tadperf.kernels import implementations, per_sample
from tadperf.run import folder
from tadperf.run.folder import Run
from tadperf.run.stage_meter import children_peak

CONFIG = merge("digits")


def test_the_seconds_of_a_stage_add_up_over_resumes(tmp_path):
    with Run.create(tmp_path / "run", CONFIG) as run:
        # mmap and not malloc: an earlier test may have told malloc to keep freed memory.
        with run.stage("data"), mmap.mmap(-1, 200 * 2**20) as block:
            for page in range(0, len(block), mmap.PAGESIZE):
                block[page] = 1
        with contextlib.suppress(KeyboardInterrupt), run.stage("matching"):
            time.sleep(0.05)
            raise KeyboardInterrupt
    with Run.create(run.path, CONFIG, resume=True) as run:
        with run.stage("matching"):
            time.sleep(0.05)
        stages = run.stages()
    assert json.loads((run.path / "stages.json").read_text()) == stages
    assert 0.1 <= stages["matching"]["seconds"] < 5
    if Path("/proc/self/clear_refs").exists():  # the peak of the stage, not of the process
        assert stages["data"]["peak_memory_mb"] > 200
        assert stages["matching"]["peak_memory_mb"] < stages["data"]["peak_memory_mb"] - 150


def test_a_stage_names_the_code_that_its_operators_ran_and_adds_it_up_over_resumes(tmp_path):
    code = implementations()["per_sample"]["cpu"]
    for resume in (False, True):
        with Run.create(tmp_path / "run", CONFIG, resume) as run:
            with run.stage("data"):
                pass
            with run.stage("trust"):
                per_sample(torch.zeros(2, 3), torch.tensor([0, 1]))
                per_sample(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1]))
    saved = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert saved["data"]["kernels"] == {}
    expected = {code: 2, "reference": 2} if code != "reference" else {"reference": 4}
    assert saved["trust"]["kernels"] == {"per_sample": expected}
    environment = json.loads((tmp_path / "run" / "env.json").read_text())
    assert environment["operators"] == implementations()


def test_the_peak_memory_includes_the_largest_child_process(tmp_path):
    with Run.create(tmp_path / "run", CONFIG) as run, run.stage("experts"):
        size = max(600 * 2**20, children_peak() + 2**27)  # the system also counts the children of earlier tests
        hungry = f"x = bytearray({size}); x[::4096] = b'x' * len(x[::4096])"
        subprocess.run([sys.executable, "-c", hungry], check=True)
    assert run.stages()["experts"]["peak_memory_mb"] > 600


def test_a_killed_stage_keeps_its_saved_time(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "SAVE_STAGES_EVERY", 0.0)
    with Run.create(tmp_path / "run", CONFIG) as run, run.stage("matching"):
        time.sleep(0.02)
        run.log("matching", 1)
        assert json.loads((run.path / "stages.json").read_text())["matching"]["seconds"] >= 0.02


def test_a_full_disk_does_not_end_a_run_at_a_progress_line(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    calls = []
    with Run.create(tmp_path / "run", CONFIG) as run:
        report = run.saving_time(lambda *values, **_: calls.append(values))
        with run.stage("matching"), monkeypatch.context() as patch:
            patch.setattr(folder, "SAVE_STAGES_EVERY", 0.0)
            patch.setattr(folder, "write_json", fail)
            time.sleep(0.01)
            report("matching", 1, 2)
            with pytest.raises(OSError, match="No space"):  # the records of a run are kept or it ends
                run.log("matching", 1)
    assert calls == [("matching", 1, 2)]
