"""Cleaned copies: every file lands in the class of its final label, the source stays as it is, nothing is half done."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tadperf.config import Config
from tadperf.config.merge import merge
from tadperf.data.open import open_data
from tadperf.errors import UserError
from tadperf.pipeline import repair
from tadperf.pipeline.repair import apply_list, apply_run, apply_verdicts, check_apply, safe_name
from tadperf.trust.state import RELABELLED, UNTRUSTED, TrustState, as_given

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("ant", "bee", "a, cat")


def save_set(root: Path, test: bool = True) -> Path:
    """Writes 12 images of three classes. Classes share file names; one name is not UTF-8, one file lies deeper."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 1))[: 1 + test]:
        for name in CLASSES:
            place = root / split / name if test else root / name
            place.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8)).save(place / f"{k}.png")
    train = root / "train" if test else root
    os.rename(train / "bee" / "3.png", os.fsencode(train / "bee") + b"/caf\xe9.png")
    (train / "ant" / "deep").mkdir()
    (train / "ant" / "0.png").rename(train / "ant" / "deep" / "0.png")
    return root


def changed(state: TrustState) -> TrustState:
    """Sample 1 moves to the class of sample 5, and sample 2 is untrusted."""
    verdict, working = state.verdict.clone(), state.working.clone()
    verdict[1], verdict[2] = RELABELLED, UNTRUSTED
    working[1] = working[5]
    return replace(state, verdict=verdict, working=working, suggested=working.clone())


def tree(root: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by its path."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def audit_config(path: Path, **options: object) -> Config:
    return merge("quick", options={"data.path": str(path), "data.noise": "none", **options})


@pytest.mark.parametrize("test", [True, False])
def test_a_folder_is_copied_by_the_working_labels(tmp_path, test):
    source = save_set(tmp_path / "set", test)
    before, train = tree(source), open_data(source).train
    state = changed(as_given(train.labels, train.class_names))
    done = apply_verdicts(tmp_path / "clean", train, state)
    assert (done["kept"], done["relabelled"], done["left_out"], done["files"]) == (10, 1, 1, "symbolic links")
    assert tree(source) == before
    again = open_data(tmp_path / "clean")
    assert again.train.class_names == train.class_names
    assert again.train.file_names is not None
    assert train.file_names is not None
    expected = sorted(
        (train.images[i].numpy().tobytes(), int(state.working[i])) for i in range(12) if bool(state.trusted[i])
    )
    found = [(image.numpy().tobytes(), int(y)) for image, y in zip(again.train.images, again.train.labels, strict=True)]
    assert sorted(found) == expected
    assert (again.test is not None) == test
    assert again.test is None or len(again.test) == 3
    with (tmp_path / "clean" / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == list(train.file_names)
    assert [row["verdict"] for row in rows[:4]] == ["trusted", "relabelled", "untrusted", "trusted"]
    assert rows[2]["target"] == rows[2]["label"] == ""
    assert set(again.train.file_names) == {row["target"] for row in rows} - {""}
    assert json.loads((tmp_path / "clean" / "manifest.json").read_text())["source"] == str(source)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("broken", "kind"), [(["symbolic links"], "hard links"), (["symbolic links", "hard links"], "copies")]
)
def test_other_links_where_symbolic_ones_cannot_be_made(tmp_path, monkeypatch, broken, kind):
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    for name in broken:
        monkeypatch.setitem(repair.LINKS, name, refuse)
    source = save_set(tmp_path / "set")
    train = open_data(source).train
    assert apply_verdicts(tmp_path / "clean", train, as_given(train.labels, train.class_names))["files"] == kind
    files = list((tmp_path / "clean").rglob("*.png"))
    assert len(files) == 12 + 3
    assert not any(path.is_symlink() for path in files)
    assert {path.stat().st_nlink for path in files} == {2 if kind == "hard links" else 1}


def test_equal_names_in_one_class_get_different_names(tmp_path):
    source = save_set(tmp_path / "set", test=False)
    train = open_data(source).train
    state = as_given(train.labels, train.class_names)
    state = replace(state, working=torch.zeros_like(state.working), verdict=torch.full_like(state.verdict, RELABELLED))
    apply_verdicts(tmp_path / "clean", train, state)
    (first, *others) = [
        sorted(p.name for p in place.iterdir()) for place in sorted((tmp_path / "clean/train").iterdir())
    ]
    assert len(first) == 12
    assert others == [[], []]
    assert len({os.path.realpath(tmp_path / "clean/train" / train.class_names[0] / name) for name in first}) == 12


def test_a_set_that_is_no_folder_gets_a_list_of_labels(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((6, 4, 4), np.uint8), labels=np.arange(6) % 3)
    train = open_data(tmp_path / "set.npz").train
    done = apply_verdicts(tmp_path / "clean", train, changed(as_given(train.labels, train.class_names)))
    assert done["files"] == "labels.csv"
    with pytest.warns(UserWarning, match="1 of 6 samples have an empty label"):
        again = open_data(tmp_path / "set.npz", labels=str(tmp_path / "clean" / "labels.csv")).train
    assert again.labels.tolist() == [0, 2, 0, 1, 2]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    for name in repair.LINKS:
        monkeypatch.setitem(repair.LINKS, name, fail)
    train = open_data(save_set(tmp_path / "set")).train
    with pytest.raises(UserError, match="No space left on device"):
        apply_verdicts(tmp_path / "clean", train, as_given(train.labels, train.class_names))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_a_missing_file_is_named(tmp_path):
    train = open_data(save_set(tmp_path / "set")).train
    (tmp_path / "set/train/bee/1.png").unlink()
    with pytest.raises(UserError, match=r"bee/1\.png: is missing"):
        apply_verdicts(tmp_path / "clean", train, as_given(train.labels, train.class_names))
    assert not (tmp_path / "clean").exists()


def test_places_that_are_refused(tmp_path):
    source = save_set(tmp_path / "set")
    (tmp_path / "there").touch()
    config = audit_config(source)
    for out, words in (
        (tmp_path / "there", "exists already"),
        (tmp_path / "none" / "out", "does not exist; make it first"),
        (source / "clean", "lies inside the data"),
        (source / "train" / "clean", "lies inside the data"),
    ):
        with pytest.raises(UserError, match=words):
            check_apply(out, config)
    os.symlink("nowhere", tmp_path / "link")
    with pytest.raises(UserError, match="exists already"):
        check_apply(tmp_path / "link", config)
    with pytest.raises(UserError, match=r"simulated noise \(symmetric:0.2\); use --noise none"):
        check_apply(tmp_path / "out", audit_config(source, **{"data.noise": "symmetric:0.2"}))
    check_apply(tmp_path / "out", config)


def test_a_corrected_list_is_applied_without_an_audit(tmp_path):
    source = save_set(tmp_path / "set")
    train = open_data(source).train
    changed(as_given(train.labels, train.class_names)).export(tmp_path / "labels.csv", train.file_names)
    with pytest.warns(UserWarning, match="1 of 12 samples"):
        done = apply_list(audit_config(source, **{"data.labels": str(tmp_path / "labels.csv")}), tmp_path / "clean")
    assert (done["kept"], done["relabelled"], done["left_out"]) == (10, 1, 1)
    assert len(list((tmp_path / "clean" / "train" / "ant").iterdir())) == 5
    with pytest.raises(UserError, match="add --labels FILE"):
        apply_list(audit_config(source), tmp_path / "other")


def test_the_verdicts_of_a_run_are_applied(tmp_path, tiny_config):
    source = save_set(tmp_path / "set")
    train = open_data(source).train
    run = tmp_path / "run"
    run.mkdir()
    config = tiny_config(data__path=str(source), data__noise="none")
    (run / "config.json").write_text(config.model_dump_json())
    changed(as_given(train.labels, train.class_names)).save(run / "trust.safetensors")
    assert apply_run(run, tmp_path / "clean")["relabelled"] == 1
    assert len(open_data(tmp_path / "clean").train) == 11
    with pytest.raises(UserError, match="is not a run folder"):
        apply_run(source, tmp_path / "other")


def test_a_test_split_that_a_run_made_is_kept(tmp_path, tiny_config):
    source = save_set(tmp_path / "set", test=False)
    config = tiny_config(data__path=str(source), data__noise="none", data__test_share=0.25)
    train = open_data(source, test_share=0.25).train
    assert len(train) == 9
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(config.model_dump_json())
    changed(as_given(train.labels, train.class_names)).save(run / "trust.safetensors")
    apply_run(run, tmp_path / "clean")
    again = open_data(tmp_path / "clean")
    assert again.test is not None
    assert (len(again.train), len(again.test), again.test.class_names) == (8, 3, train.class_names)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("cat", "cat"),
        ("a/b", "a_b"),
        ("..", "_.."),
        (".hidden", "_.hidden"),
        ("", "_"),
        ("a\nb\0", "a_b_"),
        ("猫", "猫"),
    ],
)
def test_names_of_class_folders(name, safe):
    assert safe_name(name) == safe


def test_long_names_and_surrogates_become_folders(tmp_path):
    for name in ("x" * 5000, "猫" * 5000, "\udcff"):
        (tmp_path / safe_name(name)).mkdir()
