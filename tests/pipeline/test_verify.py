"""`evaluate --verify`: a measurement agrees with the stored accuracy, or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tadperf.errors import UserError
from tadperf.nets.students import summarise
from tadperf.pipeline.verify import stored_accuracy, verify


@pytest.mark.parametrize(
    ("stored", "measured", "allowed", "agrees"),
    [
        ([0.90, 0.92], [0.90, 0.92], 3 * 0.01 * 2**0.5, True),
        ([0.90, 0.92], [0.86, 0.88], 3 * 0.01 * 2**0.5, True),
        ([0.90, 0.92], [0.855, 0.875], 3 * 0.01 * 2**0.5, False),
        ([0.90, 0.92], [0.945, 0.965], 3 * 0.01 * 2**0.5, False),
        ([0.91, 0.91], [0.914, 0.914], 0.005, True),
        ([0.91], [0.917], 0.005, False),
        ([0.91], [0.91, 0.93], 3 * (0.01**2 + 0.0002) ** 0.5, True),
        ([0.90, 0.92], [0.95], 3 * (0.01**2 + 0.0002) ** 0.5, True),
        ([0.90, 0.92], [0.97], 3 * (0.01**2 + 0.0002) ** 0.5, False),
    ],
)
def test_means_agree_within_three_standard_errors_or_half_a_point(stored, measured, allowed, agrees):
    found = verify({"convnet": stored}, {"convnet": summarise(measured)})["convnet"]
    assert found.allowed == pytest.approx(allowed)
    assert found.difference == pytest.approx(sum(measured) / len(measured) - sum(stored) / len(stored))
    assert found.agrees is agrees


def test_only_networks_that_were_stored_are_compared():
    measured = {"convnet": summarise([0.9]), "vgg11": summarise([0.5])}
    assert list(verify({"convnet": [0.9], "alexnet": [0.1]}, measured)) == ["convnet"]
    with pytest.raises(UserError, match="--verify: convnet, vgg11: was not stored; use --network alexnet"):
        verify({"alexnet": [0.1]}, measured)


def write(tmp_path: Path, content: str) -> Path:
    (tmp_path / "result.json").write_text(content)
    return tmp_path / "distilled.safetensors"


def test_the_accuracy_beside_a_file_is_read(tmp_path):
    with pytest.raises(UserError, match=r"--verify: .*result\.json: no such file; only a run or a pulled set"):
        stored_accuracy(tmp_path / "distilled.safetensors")
    file = write(tmp_path, json.dumps({"accuracy": {"convnet": summarise([0.5, 0.75])}}))
    assert stored_accuracy(file) == {"convnet": [0.5, 0.75]}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"accuracy": 3}',
        '{"accuracy": {"convnet": {"mean": 0.5}}}',
        '{"accuracy": {"convnet": {"runs": []}}}',
        '{"accuracy": {"convnet": {"runs": [97.5]}}}',
        '{"accuracy": {"convnet": {"runs": [NaN]}}}',
        '{"accuracy": {"convnet": {"runs": ["a"]}}}',
        "[" * 100000,
    ],
)
def test_a_damaged_result_is_refused_in_one_line(tmp_path, content):
    with pytest.raises(UserError, match=r"--verify: .*result\.json: is damaged: .*; copy it again") as error:
        stored_accuracy(write(tmp_path, content))
    assert "\n" not in str(error.value)
