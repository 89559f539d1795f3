"""The runs of compare_trust_modes equal runs that are started alone, and share what no mode changes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tadperf.config.merge import merge
from tadperf.pipeline.compare import compare_trust_modes
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.prepare import prepare
from tadperf.run.folder import Run

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {
    "device": "cpu",
    "net.width": 4,
    "net.depth": 1,
    "experts.count": 1,
    "experts.epochs": 2,
    "match.ipc": 1,
    "match.iterations": 2,
    "match.check_every": 2,
    "match.steps": 2,
    "match.max_start": 1,
    "match.expert_epochs": 1,
    "match.init": "real",
    "evaluate.epochs": 2,
    "evaluate.repeats": 1,
    "evaluate.full_epochs": 2,
    "evaluate.full_repeats": 1,
    "trust.rounds": 1,
    "trust.proxies": 1,
    "trust.epochs": 2,
}


def config(**values: Any):
    given = {name.replace("__", "."): value for name, value in values.items()}
    return merge("digits", None, [f"{name}={json.dumps(value)}" for name, value in (TINY | given).items()])


def run(place, mode_config) -> dict[str, Any]:
    with Run.create(place, mode_config) as opened:
        return distill_task(prepare(mode_config), opened)


def test_siblings_equal_runs_that_are_started_alone(tmp_path):
    main = run(tmp_path / "main", config())
    stages: list[str] = []
    results = compare_trust_modes(config(), tmp_path / "main", lambda stage, *_, **__: stages.append(stage))
    assert list(results) == ["on", "off", "oracle"]
    assert results["on"] == main
    assert {name.rpartition(" ")[2] for name in stages} == {"off", "oracle"}
    assert [r["trust"]["mode"] for r in results.values()] == ["on", "off", "oracle"]
    assert [r["trust"]["used_clean_labels"] for r in results.values()] == [False, False, True]
    assert results["oracle"]["trust"]["label_accuracy"] == 1.0
    assert results["off"]["trust"]["label_accuracy"] == pytest.approx(0.6, abs=0.03)
    alone = run(tmp_path / "off", config(trust__mode="off"))
    assert (alone["accuracy"], alone["baselines"]) == (results["off"]["accuracy"], results["off"]["baselines"])
    distilled = [place / "distilled.safetensors" for place in (tmp_path / "off", tmp_path / "main/compare/off")]
    assert distilled[0].read_bytes() == distilled[1].read_bytes()
    logged = (tmp_path / "main/compare/off/metrics.jsonl").read_text()
    assert '"full_data"' not in logged  # its scores come from the main run
    again = compare_trust_modes(
        config(), tmp_path / "main", lambda *_, **__: pytest.fail("a finished run started again")
    )
    assert again == json.loads(json.dumps(results))


def test_without_clean_labels_there_is_no_oracle(tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(90) % 3
    images = (rng.integers(0, 120, (90, 8, 8)) + 60 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images[:30], y_test=labels[:30])
    no_clean_labels = config(data__path=str(tmp_path / "a.npz"), data__noise="none")
    run(tmp_path / "main", no_clean_labels)
    assert list(compare_trust_modes(no_clean_labels, tmp_path / "main")) == ["on", "off"]
