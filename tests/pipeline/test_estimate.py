"""The estimate of a job: its formulas with fixed results of the probes, and one estimate with real probes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tadperf
from tadperf.pipeline import estimate, probes
from tadperf.pipeline.estimate import disk_bytes, estimate_audit, estimate_distill, job_workers, makespan
from tadperf.pipeline.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_thread")
TRAINED, TESTED, ITERATION = 1e-2, 1e-3, 0.5  # seconds of the fixed probes


@pytest.fixture
def fixed_probes(monkeypatch):
    """Replaces every probe by a constant, on a machine of four cores."""
    monkeypatch.setattr(estimate, "available_cores", lambda: 4)
    monkeypatch.setattr(probes, "side_by_side", lambda probe, workers: probe())
    for name, seconds in {
        "proxy_seconds": TRAINED,
        "training_seconds": TRAINED,
        "testing_seconds": TESTED,
        "matching_seconds": ITERATION,
        "neighbour_seconds": 2.0,
        "normalise_seconds": 1.0,
        "diffusion_seconds": 0.25,
    }.items():
        monkeypatch.setattr(probes, name, lambda *_, value=seconds: value)


def test_the_makespan_of_tasks_that_start_in_order():
    assert makespan([3, 1, 1, 1], 2) == 3
    assert makespan([1, 1, 3], 2) == 4
    assert makespan([2, 2, 2], 1) == 6
    assert makespan([5], 8) == 5
    assert makespan([], 3) == 0


def test_every_stage_is_a_count_times_a_probe(fixed_probes, tiny_config):
    config = tiny_config(trust__mode="on", trust__rounds=2, trust__proxies=4, trust__epochs=3, experts__count=5)
    task = prepare(config)
    result = estimate_distill(task)
    train, test = len(task.train), len(task.test)
    kept = round(0.9 * train)
    student = 2 * 10 * TRAINED + test * TESTED  # 2 epochs on 10 synthetic images
    check = 2 * 10 * TRAINED + (train - kept) * TESTED
    full = train * TRAINED + test * TESTED
    assert result["stages"]["data"] == 1
    proxy = 3 * 0.75 * train * TRAINED + (3 + 1) * train * TESTED
    assert result["stages"]["trust"] == pytest.approx(2 * (proxy + 2), abs=0.01)
    expert = kept * (2 * TRAINED + TESTED)
    assert result["stages"]["experts"] == pytest.approx(2 * expert, abs=0.01)  # five experts on four cores
    assert result["stages"]["matching"] == pytest.approx(4 * ITERATION + 2 * check, abs=0.01)
    # Three cores are idle for 4 iterations and 2 checks. Initial and random students end there; the students on all
    # images started there, so `evaluate` waits for the rest of the last one.
    background = result["stages"]["matching"]
    assert student < background
    assert result["stages"]["evaluate"] == pytest.approx(student + full - background, abs=0.02)
    assert result["seconds"] == pytest.approx(sum(result["stages"].values()), abs=0.02)


def test_the_rows_of_the_ladder_count(fixed_probes, tiny_config, monkeypatch):
    """Two rows of three students, 100 s each, on four cores."""
    values = {"trust__mode": "on", "match__soft_labels": True, "evaluate__epochs": 1000, "evaluate__repeats": 4}
    task = prepare(tiny_config(**values))
    complete = estimate_distill(task)["stages"]["evaluate"]
    monkeypatch.setattr(estimate, "LADDER_REPEATS", 0)
    assert 100 <= complete - estimate_distill(task)["stages"]["evaluate"] <= 200


def test_counts_scale_the_estimate(fixed_probes, tiny_config):
    once = estimate_distill(prepare(tiny_config()))["stages"]
    twice = estimate_distill(prepare(tiny_config(match__iterations=8, experts__epochs=4)))["stages"]
    assert twice["matching"] == pytest.approx(2 * once["matching"], abs=0.02)
    assert 1.8 * once["experts"] < twice["experts"] < 2 * once["experts"]
    assert "trust" not in once


def test_generative_jobs_train_a_detector_and_a_diffusion_model(fixed_probes, tiny_config):
    result = estimate_distill(prepare(tiny_config(synthesis="generative")))
    assert list(result["stages"]) == ["data", "detector", "diffusion", "refine", "evaluate"]
    assert result["stages"]["diffusion"] == 3 * 0.25
    assert result["stages"]["refine"] > 0
    assert "experts" not in result["disk"]


def test_ranks_divide_the_cores_or_have_a_device_each(monkeypatch, tiny_config):
    monkeypatch.setattr(estimate, "available_cores", lambda: 4)
    task = prepare(tiny_config(match__trajectories=3))
    assert job_workers(task, 1) == (1, 4, 4, 3)
    assert job_workers(task, 2) == (2, 2, 4, 2)
    cuda: Any = SimpleNamespace(config=task.config, device=torch.device("cuda"))
    assert job_workers(cuda, 2) == (2, 2, 2, 2)


def test_two_ranks_halve_the_trajectories_of_matching(fixed_probes, monkeypatch, tiny_config):
    monkeypatch.setattr(probes, "matching_seconds", lambda task, trajectories: 10.0 * trajectories)
    task = prepare(tiny_config(match__trajectories=4))
    one, two = (estimate_distill(task, ranks)["stages"]["matching"] for ranks in (1, 2))
    assert one - two == pytest.approx(4 * 20.0)


def test_an_audit_takes_the_stages_data_and_trust(fixed_probes, tiny_config):
    task = estimate.audit_task(tiny_config(trust__mode="on"))
    result = estimate_audit(task)
    assert list(result["stages"]) == ["data", "trust"]
    assert list(result["disk"]) == ["trust"]
    assert result["counts"]["test"] == 0


def test_the_disk_figures_match_the_files_of_a_run(tmp_path, tiny_config):
    config = tiny_config(experts__count=2, experts__epochs=3)
    tadperf.distill(config, tmp_path / "run")

    def size(*names: str) -> int:
        return sum(path.stat().st_size for name in names for path in (tmp_path / "run").glob(name))

    task = prepare(config)
    module = estimate.build(config.net, task.train.shape, task.train.num_classes, 0)
    parameters = sum(p.numel() for p in module.parameters())
    disk = disk_bytes(task, parameters, ["experts", "matching", "evaluate"])
    assert disk["experts"] == pytest.approx(size("experts/*.safetensors"), rel=0.05)
    assert disk["distilled"] < size("distilled.safetensors") < 3 * disk["distilled"] + 10_000  # a header of 5 kB


def test_an_estimate_with_real_probes(tmp_path, monkeypatch, tiny_config):
    """Every stage has a finite positive time. Nothing is written and the global state is restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "PROBE_SECONDS", 0.2)
    threads = torch.get_num_threads()
    result = estimate_distill(prepare(tiny_config(trust__mode="on", synthesis="hybrid")))
    assert all(math.isfinite(value) and value >= 0 for value in result["stages"].values())
    assert all(result["stages"][stage] > 0 for stage in ("trust", "experts", "matching", "evaluate", "diffusion"))
    assert result["memory_bytes"] > 2**25
    assert list(Path().iterdir()) == []
    assert torch.get_num_threads() == threads
    assert probes.counting.__module__ == "tadperf.compute.work_progress"


def test_whitening_adds_its_decomposition_and_its_products(monkeypatch, tiny_config):
    clock = iter([0.0, 1.0, 10.0, 12.0])  # the sample takes 1 s, the decomposition 2 s
    task = prepare(tiny_config(data__normalise="zca"))
    images, inputs = len(task.train) + len(task.test), 64
    monkeypatch.setattr(probes.time, "perf_counter", lambda: next(clock))
    seconds = probes.normalise_seconds(task, task.train.images[:100], lambda part: part)
    decomposed = probes.DECOMPOSITION * inputs
    assert seconds == pytest.approx(images / 100 + 2 * (decomposed + len(task.train) + images) / decomposed)


def test_a_probe_counts_the_images_after_its_warm_up(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(probes.time, "perf_counter", lambda: float(next(clock)))

    def train() -> None:
        for _ in range(1000):
            probes_count(8)

    from tadperf.compute.work_progress import add_trained as probes_count

    # Each batch reads the clock once, and three batches of warm-up once more.
    assert probes.seconds_per_image(train, torch.device("cpu"), 20.0) == pytest.approx(1 / 8, rel=0.1)
