"""Public functions restore PyTorch's settings, the environment and the mode of a network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers.models  # noqa: F401  # sets TORCHINDUCTOR_CACHE_DIR when it is imported
import pytest
import sklearn.cluster  # noqa: F401  # sets KMP_DUPLICATE_LIB_OK and KMP_INIT_AT_FORK when it is imported
import torch
from torch import nn

import tadperf
from tadperf.config import Config
from tadperf.config.merge import merge
from tadperf.pipeline.compare import compare_trust_modes
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.evaluate import evaluate_file
from tadperf.pipeline.experts import train_shared_experts
from tadperf.pipeline.prepare import prepare
from tadperf.pipeline.sweep import check_cells, parse_axes, run_sweep, sweep_cells
from tadperf.run.folder import Run
from tadperf.trust import audit, find_label_issues

THREADS = 2  # more than the one thread that small runs use


def settings() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "tf32 of products": torch.backends.cuda.matmul.allow_tf32,
        "tf32 of convolutions": torch.backends.cudnn.allow_tf32,
        "environment": dict(os.environ),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "random state": torch.get_rng_state().tolist(),
    }


@pytest.fixture(autouse=True)
def unusual_settings() -> Iterator[None]:
    """Sets values that no function of tadperf sets itself."""
    before = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.set_num_threads(THREADS)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    yield
    torch.set_num_threads(before[0])
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[1:]


def assert_restores(function: Callable[[], Any]) -> Any:
    before = settings()
    result = function()
    assert settings() == before
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., Config]) -> Path:
    """Returns the folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    tadperf.distill(tiny_config(), folder)
    return folder


@pytest.mark.parametrize("synthesis", ["matching", "generative", "hybrid"])
def test_distill(tmp_path, synthesis, tiny_config):
    assert_restores(lambda: tadperf.distill(tiny_config(synthesis=synthesis), tmp_path / "run"))


def test_distill_with_trust(tmp_path, tiny_config):
    assert_restores(lambda: tadperf.distill(tiny_config(trust__mode="on"), tmp_path / "run"))


def test_distill_that_fails(tmp_path, tiny_config):
    class StopError(Exception):
        pass

    def stop(stage: str, done: int, total: int, **values: object) -> None:
        if stage == "matching":
            raise StopError

    def fails() -> None:
        with pytest.raises(StopError):
            tadperf.distill(tiny_config(tf32=True), tmp_path / "run", progress=stop)

    assert_restores(fails)


def test_distill_task_without_evaluation(tmp_path, tiny_config):
    def run() -> None:
        task = prepare(tiny_config())
        with Run.create(tmp_path / "run", task.config) as opened:
            distill_task(task, opened, evaluate=False)

    assert_restores(run)


def test_train_shared_experts(tmp_path, tiny_config):
    def run() -> None:
        task = prepare(tiny_config())
        with Run.create(tmp_path / "run", task.config) as opened:
            train_shared_experts(task, opened)

    assert_restores(run)


def test_compare_trust_modes(tmp_path, tiny_config):
    tadperf.distill(tiny_config(), tmp_path / "run")
    assert_restores(lambda: compare_trust_modes(tiny_config(), tmp_path / "run"))


def test_run_sweep(tmp_path, tiny_config):
    def run() -> None:
        axes = parse_axes(["match.iterations=1,2"])
        cells = sweep_cells(axes, lambda sets: merge(sets=sets, base=tiny_config()))
        check_cells(cells, tmp_path / "sweep")
        run_sweep(cells, tmp_path / "sweep")

    assert_restores(run)


def test_evaluate_file(finished):
    assert_restores(lambda: evaluate_file(finished / "distilled.safetensors", repeats=1, device="cpu"))


def test_load_open_data_and_save(finished, tmp_path):
    assert_restores(lambda: tadperf.load(finished / "distilled.safetensors").save(tmp_path / "copy.safetensors"))
    assert_restores(lambda: tadperf.open_data("digits"))


def test_train_and_accuracy_of_a_distilled_set(finished):
    distilled = tadperf.load(finished / "distilled.safetensors")
    net = assert_restores(lambda: distilled.train(epochs=1))
    for training in (True, False):
        net.train(training)
        assert_restores(lambda: distilled.accuracy(net, "digits"))
        assert {module.training for module in net.modules()} == {training}


def test_accuracy_of_a_network_with_mixed_modes(finished):
    distilled = tadperf.load(finished / "distilled.safetensors")
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)).train()
    net[0].eval()
    modes = [module.training for module in net.modules()]
    assert_restores(lambda: distilled.accuracy(net, "digits"))
    assert [module.training for module in net.modules()] == modes


def test_audit(tiny_config):
    train = tadperf.open_data("digits").train
    assert_restores(lambda: audit(train, tiny_config(trust__mode="on")))


def test_find_label_issues():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(60, 3, generator=generator).softmax(1).numpy()
    labels = (torch.arange(60) % 3).numpy()
    assert_restores(lambda: find_label_issues(labels, probabilities))
