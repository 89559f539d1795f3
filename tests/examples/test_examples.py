"""Every example runs, and what it prints shows that it does its work."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
NUMBER = r"([\d.]+)"
MOST_LINES = 80
PACKAGES = {
    "__future__",
    "argparse",
    "json",
    "pathlib",
    "tempfile",
    "time",
    "torch",
    "numpy",
    "PIL",
    "sklearn",
    "tadperf",
    "transformers",  # hf_trainer.py alone
    "accelerate",
}


def output_of(name: str, folder: Path, *arguments: str) -> str:
    """Runs an example as `python FILE --quick ...` would, but here: a new process needs 3 CPU s to import torch."""
    (file,) = [path for path in EXAMPLES if path.stem == name]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(file), "--quick", *arguments])
        runpy.run_path(str(file), run_name="__main__")
    return out.getvalue()


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
    trusted, right = map(float, re.findall(rf"partition trusts {NUMBER}% of the labels; {NUMBER}% are right", out)[0])
    assert 50 < trusted < 80
    assert right > 95


def test_the_matching_loss_of_mtt(tmp_path):
    lines = output_of("mtt_matching_loss", tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines] == [" 1 x 320010", "16 x 320010"]
    for line in lines:  # the example itself asserts that values and gradients agree
        before, after, gain = map(
            float, re.findall(rf"before {NUMBER} ms, after {NUMBER} ms, before / after {NUMBER}", line)[0]
        )
        assert gain == pytest.approx(before / after, rel=0.1, abs=0.1)


def test_the_adjoint_in_the_loop_of_mtt(tmp_path):
    out = output_of("mtt_adjoint", tmp_path)
    assert "the gradients agree" in out  # the example itself compares them
    assert float(re.findall(rf"autograd stores {NUMBER} MB for 5 unrolled steps", out)[0]) > 10
    assert len(re.findall(rf"^(?:before|after) +{NUMBER} ms of processor time", out, re.MULTILINE)) == 2


def audit_figures(out: str) -> tuple[int, int, float, float]:
    """Returns the wrong labels, the suspected ones, precision and recall that an example prints."""
    wrong, suspected = map(int, re.findall(r"(\d+) wrong labels, (\d+) suspected", out)[0])
    precision, recall = map(float, re.findall(rf"precision {NUMBER}, recall {NUMBER}", out)[0])
    return wrong, suspected, precision, recall


def test_the_audit_of_texts(tmp_path):
    out = output_of("audit_text_features", tmp_path)
    wrong, suspected, precision, recall = audit_figures(out)
    assert precision > 0.8
    assert recall > 0.8
    assert precision * suspected == pytest.approx(recall * wrong, abs=0.5)


def test_the_audit_of_a_folder(tmp_path):
    out = output_of("audit_your_folder", tmp_path)
    wrong, suspected, precision, recall = audit_figures(out)
    assert precision > 0.8
    assert recall > 0.9
    assert precision * suspected == pytest.approx(recall * wrong, abs=0.1)
    kept, corrected, left_out = map(
        int, re.findall(r"(\d+) labels kept, (\d+) corrected, (\d+) images left out", out)[0]
    )
    assert kept + corrected + left_out == 800
    assert corrected + left_out == suspected


def test_the_audit_of_a_folder_of_the_user(tmp_path):
    rng = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "photos/train" / label).mkdir(parents=True)
        for i in range(30):
            values = rng.integers(0, 90, (8, 8)) + (150 if label == "light" else 0)
            Image.fromarray(values.astype(np.uint8)).save(tmp_path / "photos/train" / label / f"{i}.png")
    out = output_of("audit_your_folder", tmp_path, "photos", "cleaned")
    kept, corrected, left_out = map(
        int, re.findall(r"(\d+) labels kept, (\d+) corrected, (\d+) images left out", out)[0]
    )
    assert kept + corrected + left_out == 60
    assert len(list((tmp_path / "cleaned/train").rglob("*.png"))) == kept + corrected
    assert len((tmp_path / "cleaned.csv").read_text().splitlines()) == 61


def test_the_network_of_a_user_on_a_distilled_set(tmp_path):
    out = output_of("distil_and_use", tmp_path)
    assert "DistilledSet(digits: 10 images of 1 x 8 x 8, 10 classes, soft labels" in out
    own, published = map(float, re.findall(rf": {NUMBER}%", out))
    assert min(own, published) > 60  # ten random images give the ConvNet 70 % (README.md), chance is 10 %


def test_the_training_on_trusted_samples(tmp_path):
    out = output_of("train_on_trusted", tmp_path)
    given, trusted = map(float, re.findall(rf"test accuracy {NUMBER}%", out))
    assert trusted > 90
    assert trusted > given + 15


def test_a_base_of_a_user(tmp_path):
    out = output_of("custom_base", tmp_path)
    first, last = map(float, re.findall(rf"ten iterations {NUMBER}, of the last ten {NUMBER}", out)[0])
    assert last < 0.9 * first
    accuracies = [float(share) for share in re.findall(rf"{NUMBER}%", out)]
    assert len(accuracies) == 3
    assert max(accuracies) > 75  # ten random images give the ConvNet 70 % (README.md)


def test_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    out = output_of("hf_trainer", tmp_path)
    count, accuracy = re.findall(rf"trained on (\d+) images: {NUMBER}%", out)[0]
    assert int(count) == 100
    assert float(accuracy) > 85  # 94.5 % with 10 iterations; chance is 10 %


def test_the_trainer_of_transformers_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)  # as if it was not installed
    with pytest.raises(SystemExit, match=r"^this example needs the Trainer of transformers: pip install transformers"):
        output_of("hf_trainer", tmp_path)


def test_every_example_is_tested():
    assert {file.stem for file in EXAMPLES} == set(re.findall(r'output_of\("(\w+)"', Path(__file__).read_text()))


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
            assert name.split(".")[0] in PACKAGES
            assert not any(part.startswith("_") for part in name.split(".")[1:])


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_short_and_says_what_it_does(file):
    text = file.read_text()
    assert len(text.splitlines()) < MOST_LINES
    assert len((ast.get_docstring(ast.parse(text)) or "").splitlines()) > 2
