"""Every command that opens data shows the progress of decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tadperf.artifact import load
from tadperf.config.merge import merge
from tadperf.errors import UserError
from tadperf.pipeline import api
from tadperf.pipeline.evaluate import evaluate_file

DECODED = "decoding images 6/6"


@pytest.fixture
def folder(tmp_path) -> Path:
    """An image folder of six images: too few for a run, which therefore ends as soon as the data are open."""
    rng = np.random.default_rng(0)
    for k in range(6):
        file = tmp_path / "set" / "train" / "ab"[k % 2] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(file)
    return tmp_path / "set"


@pytest.mark.parametrize(
    "command", [["distill", "--ipc=5"], ["refine", "--ipc=5"], ["experts"], ["sweep", "match.ipc=5,6", "--data"]]
)
def test_commands(tadperf, folder, command):
    code, out, err = tadperf(*command, folder, "--out", "run")
    assert (code, out) == (2, "")
    assert DECODED in err
    assert "has no test split; 2 of 6 images (20 % of each class, data.test_share) are drawn" in err
    assert DECODED not in tadperf(*command, folder, "--out", "run", "--quiet").err


def test_the_python_interface(folder, tmp_path):
    calls: list[tuple[str, int, int]] = []
    with pytest.raises(UserError, match="too small"):
        api.distill(
            merge(options={"data.path": str(folder)}), tmp_path / "run", progress=lambda *c, **_: calls.append(c)
        )
    assert ("decode", 6, 6) in calls


def test_evaluate(tadperf, tiny, folder, tmp_path):
    assert tadperf("distill", "digits", *tiny, "--out", "run", "--quiet").code == 0
    (folder / "train").rename(folder / "test")
    file = tmp_path / "run" / "distilled.safetensors"
    calls: list[tuple[str, int, int]] = []
    with pytest.raises(UserError, match="other classes"):
        evaluate_file(file, str(folder), progress=lambda *c, **_: calls.append(c))
    assert ("decode", 6, 6) in calls
    with pytest.raises(UserError, match="other classes"):
        load(file).test_split(folder)
