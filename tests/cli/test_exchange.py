"""`tadperf export` and `tadperf import`, and `evaluate` on an imported set."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tadperf.artifact import DistilledSet, load
from tadperf.config import NetConfig
from tadperf.data.normalise import fit_normaliser
from tadperf.data.open import open_data

SMALL = [f"--set={s}" for s in ("net.width=8", "net.depth=1", "evaluate.epochs=40", "evaluate.repeats=2")]


@pytest.fixture
def file(tmp_path) -> Path:
    """Returns a distilled file of 20 real digits whose data are the built-in digits."""
    train = open_data("digits").train
    rows = torch.cat([(train.labels == c).nonzero()[:2, 0] for c in range(10)])
    normaliser = fit_normaliser(train.images)
    ds = DistilledSet.from_tensors(
        normaliser(train.images[rows]),
        train.labels[rows],
        lr=0.02,
        class_names=train.class_names,
        normaliser=normaliser,
        data={"name": "digits", "source": train.source},
    )
    ds.save(tmp_path / "d.safetensors")
    return tmp_path / "d.safetensors"


@pytest.mark.parametrize("layout", ["mtt", "ddranking", "folder"])
def test_an_exported_set_is_imported_and_evaluated(tadperf, file, layout):
    folder = file.with_name(f"d-{layout}")
    exported = tadperf("export", file, "--to", layout)
    assert (exported.code, exported.out) == (0, f"{folder}\n")
    imported = tadperf("import", folder, "--out", "again.safetensors", "--data=digits", "--lr=0.02", *SMALL)
    assert (imported.code, imported.out) == (0, "again.safetensors\n"), imported.err
    assert "20 images of 1 x 8 x 8, 10 classes, hard labels, lr 0.02" in imported.err
    result = tadperf("evaluate", "again.safetensors", "--device=cpu", "--json", "--quiet")
    assert result.code == 0, result.err
    scores = json.loads(result.out)["accuracy"]["convnet"]
    assert len(scores["runs"]) == 2
    assert scores["mean"] > 0.5


def test_a_set_without_data_is_evaluated_on_data_of_the_command_line(tadperf, file):
    tadperf("export", file, "--to=mtt", "--mean=0.3", "--std=0.37")
    imported = tadperf("import", "d-mtt", "--out=a", "--mean=0.3", "--std=0.37", *SMALL, "--json", "--quiet")
    assert json.loads(imported.out) == {"file": "a", "images": 20, "classes": 10}
    assert tadperf("evaluate", "a", "--json").code == 2
    assert tadperf("evaluate", "a", "digits", "--device=cpu", "--json", "--quiet").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "d.safetensors", "--to=zip"], "tadperf: --to: zip: must be one of folder, mtt, ddranking"),
        (["export", "none", "--to=mtt"], "tadperf: file: none: no such file; check the path"),
        (["export", "d.safetensors", "--to=mtt", "--mean=0.5"], "tadperf: --std: missing: give both --mean and --std"),
        (["export", "d.safetensors", "--to=mtt", "--mean=a", "--std=1"], "tadperf: --mean: a: must be numbers with"),
        (["import", "d.safetensors", "--out=a"], "tadperf: PATH: d.safetensors: must be named images*.pt"),
        (["import", ".", "--out=a", "--constants=mnist"], "tadperf: --constants: mnist: must be cifar or imagenet"),
        (["import", ".", "--out=a", "--constants=cifar", "--std=1"], "tadperf: --constants: cifar: stands for --mean"),
    ],
)
def test_wrong_use_is_one_line(tadperf, file, arguments, message):
    outcome = tadperf(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(message)
    assert outcome.err.count("\n") == 1


def test_a_file_that_cannot_be_written_is_one_line(tadperf, file):
    tadperf("export", file, "--to=ddranking")
    outcome = tadperf("import", "d-ddranking", "--data=digits", "--out=none/a", "--quiet")
    assert outcome.code == 2
    assert outcome.err == "tadperf: --out: none/a: cannot be written: No such file or directory; choose another file\n"


def test_verify_compares_with_the_stored_accuracy(tadperf, file):
    arguments = ["evaluate", file, "--verify", "--device=cpu", "--repeats=2"]
    ds = replace(load(file), net=NetConfig(width=8, depth=1), recipe=load(file).recipe._replace(epochs=20))
    ds.save(file)
    missing = tadperf(*arguments)
    assert (missing.code, missing.err.count("\n")) == (2, 1)
    assert "result.json: no such file; only a run or a pulled set stores its accuracy" in missing.err
    measured = json.loads(tadperf(*arguments[:2], *arguments[3:], "--json").out)
    file.with_name("result.json").write_text(json.dumps({"accuracy": measured["accuracy"]}))
    agrees = tadperf(*arguments, "--quiet")
    assert agrees.code == 0
    assert "convnet agrees: " in agrees.out
    file.with_name("result.json").write_text(json.dumps({"accuracy": {"convnet": {"runs": [1.0, 1.0]}}}))
    differs = tadperf(*arguments, "--quiet", "--json")
    assert differs.code == 1
    found = json.loads(differs.out)["verify"]["convnet"]
    assert (found["stored"], found["agrees"]) == (1.0, False)
    assert found["measured"] == measured["accuracy"]["convnet"]["mean"]
    both = tadperf(*arguments, "--protocol=hard")
    assert (both.code, both.err.count("\n")) == (2, 1)


def test_a_pushed_set_is_pulled_under_its_name(tadperf, file):
    assert tadperf("push", file, "mirror/mine", "--license=mit").out == "mirror/mine\n"
    assert tadperf("pull", "mirror/mine").out == "mine\n"
    assert tadperf("show", "mine").code == 0
    again = tadperf("pull", "mirror/mine")
    assert (again.code, again.err) == (2, "tadperf: --out: mine: exists already; choose another folder\n")
    assert json.loads(tadperf("pull", "mirror/mine", "--out=b", "--json").out)["folder"] == "b"


def test_verify_compares_with_a_published_accuracy(tadperf, file):
    tadperf("export", file, "--to=mtt", "--mean=0.3", "--std=0.37")
    options = ["--data=digits", "--lr=0.02", "--mean=0.3", "--std=0.37", *SMALL, "--quiet"]
    for name, accuracy, code in (("near", "75,15", 0), ("far", "1.5,0.1", 1)):
        assert tadperf("import", "d-mtt", f"--out={name}", f"--accuracy={accuracy}", *options).code == 0
        result = tadperf("evaluate", name, "--verify", "--device=cpu", "--quiet", "--json")
        found = json.loads(result.out)["verify"]["convnet"]
        assert (result.code, found["stored"]) == (code, float(accuracy.split(",")[0]) / 100)
    for wrong in ("75", "0.75,0.1", "101,1", "75,-1", "nan,1", "75,1,2"):
        outcome = tadperf("import", "d-mtt", "--out=wrong", f"--accuracy={wrong}", *options)
        remedy = "must be mean and standard deviation in percent, such as 28.3,0.5"
        assert (outcome.code, outcome.err) == (2, f"tadperf: --accuracy: {wrong}: {remedy}\n")
