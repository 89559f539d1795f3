"""The examples run: both versions agree, and the printed gain is the ratio of the printed times."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
NUMBER = r"([\d.]+)"


def output_of(name: str, folder: Path) -> str:
    (file,) = [path for path in EXAMPLES if path.stem == name]
    command = [sys.executable, file, "--quick"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_split_of_dividemix(tmp_path):
    out = output_of("dividemix_step", tmp_path)
    milliseconds = {name: float(ms) for name, ms in re.findall(rf"^(before|after) +{NUMBER} ms", out, re.MULTILINE)}
    correct = [float(share) for share in re.findall(rf"{NUMBER}% of the labels correctly", out)]
    assert len(correct) == 2
    assert min(correct) > 90  # chance is 73 %: that share of the labels is clean
    assert float(re.findall(rf"agree on {NUMBER}%", out)[0]) > 90
    gain = float(re.findall(rf"^{NUMBER} times faster", out, re.MULTILINE)[0])
    assert gain == pytest.approx(milliseconds["before"] / milliseconds["after"], rel=0.1, abs=0.5)
    assert gain > 3  # 44 times on a quiet machine (bench/results/operators.md)


def test_the_matching_loss_of_mtt(tmp_path):
    lines = output_of("mtt_matching_loss", tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines] == [" 1 x 320010", "16 x 320010"]
    for line in lines:  # the example itself asserts that values and gradients agree
        before, after, gain = map(float, re.findall(rf"before {NUMBER} ms, after {NUMBER} ms, {NUMBER} times", line)[0])
        assert gain == pytest.approx(before / after, rel=0.1, abs=0.1)


def test_the_audit_of_texts(tmp_path):
    out = output_of("audit_text_features", tmp_path)
    wrong, suspected = map(int, re.findall(r"(\d+) wrong labels, (\d+) suspected", out)[0])
    precision, recall = map(float, re.findall(rf"precision {NUMBER}, recall {NUMBER}", out)[0])
    assert precision > 0.8
    assert recall > 0.8
    assert precision * suspected == pytest.approx(recall * wrong, abs=0.5)


def test_every_example_is_tested():
    tested = {name for name, value in globals().items() if name.startswith("test_the_") and callable(value)}
    assert len(tested) == len(EXAMPLES)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_needs_few_packages_and_only_public_names(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            assert name.split(".")[0] in {"__future__", "argparse", "time", "torch", "numpy", "sklearn", "tadperf"}
            assert not any(part.startswith("_") for part in name.split(".")[1:])
