"""Settings and data that make a run useless end in an error or a warning that says what to change."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

import tadperf
from tadperf.errors import UserError
from tadperf.pipeline.prepare import prepare
from tadperf.pipeline.scoring import warn_at_chance

pytestmark = pytest.mark.usefixtures("one_thread")


def data_with_rare_class(path: Path, count: int) -> str:
    """Writes 60 random grey images of the classes ant and bee, and `count` of the class cat."""
    rng = np.random.default_rng(0)
    labels = np.array([0, 1] * 30 + [2] * count)
    images = rng.integers(0, 255, (len(labels), 8, 8)).astype(np.uint8)
    names = np.array(["ant", "bee", "cat"])
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels, class_names=names)
    return str(path)


def test_a_learned_rate_of_zero_names_its_field(tmp_path, tiny_config):
    with pytest.raises(UserError, match=r"match\.lr_lr: 1000000\.0: too large: .* learning rate to (0\.0|inf)"):
        tadperf.distill(tiny_config(match__lr_lr=1e6), tmp_path / "run")


@pytest.mark.parametrize(
    ("field", "value", "row"), [("evaluate__lr", 1e30, "convnet"), ("evaluate__real_lr", 1e30, "full_data")]
)
def test_students_that_diverge_are_reported(tmp_path, tiny_config, caplog, field, value, row):
    with caplog.at_level(logging.WARNING, logger="tadperf"):
        tadperf.distill(tiny_config(**{field: value}), tmp_path / "run")
    assert any(f"students of {row} " in line and field.replace("__", ".") in line for line in caplog.messages)


def test_only_rows_at_chance_are_reported(caplog):
    with caplog.at_level(logging.WARNING, logger="tadperf"):
        warn_at_chance({"convnet": [0.5, 0.6], "random_real": [0.1, 0.05]}, 10)
    assert len(caplog.messages) == 1
    assert "random_real reach 7.5 %" in caplog.messages[0]
    assert "(10.0 %)" in caplog.messages[0]


def test_experts_that_diverge_name_their_field(tmp_path, tiny_config):
    with pytest.raises(UserError, match=r"experts\.lr: 1e\+30: expert 0 diverged"):
        tadperf.distill(tiny_config(experts__lr=1e30), tmp_path / "run")


def test_a_class_of_one_sample_is_refused_before_trust(tmp_path, tiny_config):
    path = data_with_rare_class(tmp_path / "a.npz", 1)
    with pytest.raises(UserError, match=r"class 'cat' has only 1 training sample.*--trust off"):
        prepare(tiny_config(data__path=path, data__noise="none", trust__mode="on"))
    prepare(tiny_config(data__path=path, data__noise="none", trust__mode="off"))


def test_from_python_an_existing_run_names_arguments(tmp_path, tiny_config):
    with pytest.raises(UserError) as error:
        tadperf.distill(tiny_config(), tmp_path)
    assert str(error.value) == (
        f"out: {tmp_path}: exists already; continue that run with resume=True, or choose another folder"
    )


def test_too_few_samples_after_holdout(tmp_path, tiny_config):
    path = data_with_rare_class(tmp_path / "a.npz", 6)
    with pytest.raises(UserError) as error:
        prepare(tiny_config(data__path=path, data__noise="none", data__holdout=0.4, match__ipc=5))
    assert str(error.value) == (
        "--ipc: 5: class 'cat' has only 4 samples to start from, 2 samples are held out (data.holdout); "
        "use at most 4, or add images of this class, or remove the class"
    )


def test_a_class_that_trust_empties_is_explained(tmp_path, tiny_config):
    path = data_with_rare_class(tmp_path / "a.npz", 2)  # random images: nothing can confirm the labels
    config = tiny_config(data__path=path, data__noise="none", trust__mode="on", trust__epochs=3, match__ipc=2)
    prepare(config)
    with pytest.raises(UserError) as error:
        tadperf.distill(config, tmp_path / "run")
    assert "class 'cat' has only" in str(error.value)
    assert "of its 2 labels are confirmed" in str(error.value)
    assert "trust.mode off" in str(error.value)
