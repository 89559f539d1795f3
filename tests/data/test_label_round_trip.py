"""The list of labels that tadperf writes can be given back as --labels: without changes, or with corrections."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tadperf.data import mapped
from tadperf.data.dataset import Dataset
from tadperf.data.open import open_data
from tadperf.errors import DataWarning, UserError
from tadperf.trust.state import RELABELLED, UNTRUSTED, TrustState, as_given

COUNT = 12


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of images. One file name is not UTF-8, and two files differ in their folder only."""
    rng = np.random.default_rng(0)
    for k in range(COUNT):
        place = tmp_path / "set" / "train" / ("ant", "bee", "a, cat")[k % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8)).save(place / f"{k // 3}.png")
    cats = tmp_path / "set" / "train" / "a, cat"
    os.rename(cats / "0.png", os.fsencode(cats) + b"/caf\xe9.png")
    (tmp_path / "set" / "train" / "ant" / "ant").mkdir()
    (tmp_path / "set" / "train" / "ant" / "1.png").rename(tmp_path / "set" / "train" / "ant" / "ant" / "0.png")
    return tmp_path / "set"


@pytest.fixture
def arrays(tmp_path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 4, 4), np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(COUNT) % 3)
    return tmp_path / "set.npz"


def audited(dataset: Dataset) -> TrustState:
    """Returns a state in which sample 2 is untrusted and sample 5 is relabelled."""
    state = as_given(dataset.labels, dataset.class_names)
    verdict, working, score = state.verdict.clone(), state.working.clone(), torch.rand(COUNT)
    verdict[2], verdict[5] = UNTRUSTED, RELABELLED
    working[5] = (working[5] + 1) % 3
    return replace(state, verdict=verdict, working=working, score=score)


@pytest.mark.parametrize("kind", ["folder", "arrays"])
def test_a_list_that_is_not_changed_gives_the_trusted_samples_and_their_working_labels(tmp_path, request, kind):
    path = request.getfixturevalue(kind)
    before = open_data(path).train
    state = audited(before)
    state.export(tmp_path / "labels.csv", before.file_names)
    with pytest.warns(DataWarning, match="--labels: 1 of 12 samples have an empty label and are left out"):
        after = open_data(path, labels=str(tmp_path / "labels.csv")).train
    assert torch.equal(after.labels, state.working[state.trusted])
    assert torch.equal(after.images, before.images[state.trusted])
    if before.file_names is not None:
        assert after.file_names == tuple(name for k, name in enumerate(before.file_names) if k != 2)


def test_the_first_column_names_the_file(tmp_path, folder):
    before = open_data(folder).train
    assert before.file_names is not None
    assert "train/a, cat/caf\\xe9.png" in before.file_names
    audited(before).export(tmp_path / "labels.csv", before.file_names)
    with open(tmp_path / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:2] == ["file", "index"]
    assert {row["file"]: int(row["index"]) for row in rows} == {name: k for k, name in enumerate(before.file_names)}


def edit(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Applies `change` to every row of a list."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        change(row)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_corrected_list(tmp_path, folder):
    before = open_data(folder).train
    state = audited(before)
    state.export(tmp_path / "labels.csv", before.file_names)
    edit(tmp_path / "labels.csv", lambda row: row.update(label=row["label"] or "bee"))
    after = open_data(folder, labels=str(tmp_path / "labels.csv")).train
    expected = state.working.clone()
    expected[2] = before.class_names.index("bee")
    assert torch.equal(after.labels, expected)


def test_a_list_of_an_earlier_version_without_files(tmp_path, folder):
    before = open_data(folder).train
    state = as_given(before.labels.roll(1), before.class_names)
    state.export(tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_text().startswith("index,verdict,score,given_label,")
    assert torch.equal(open_data(folder, labels=str(tmp_path / "labels.csv")).train.labels, state.given)


def test_lists_that_leave_too_much_out_are_refused(tmp_path, arrays, monkeypatch):
    file = tmp_path / "labels.csv"
    as_given(open_data(arrays).train.labels, ("0", "1", "2")).export(file)
    original = file.read_text()

    def refuse(words: str, change: Callable[[dict[str, str]], object]) -> None:
        file.write_text(original)
        edit(file, change)
        with pytest.raises(UserError, match=words) as caught:
            open_data(arrays, labels=str(file))
        assert caught.value.field == "labels"

    refuse("all labels are empty", lambda row: row.update(label=""))
    with pytest.warns(DataWarning, match="4 of 12"):
        refuse("class '2' has no training sample", lambda row: row["label"] == "2" and row.update(label=""))
    monkeypatch.setattr(mapped, "is_large", lambda shape: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refuse("too large for memory; remove these images", lambda row: row["index"] == "2" and row.update(label=""))


def test_clean_labels_of_the_samples_that_are_left(tmp_path, arrays):
    rows = "\n".join(f"{k},{'' if k == 1 else k % 3},{(k + 1) % 3}" for k in reversed(range(COUNT)))
    (tmp_path / "a.csv").write_text(f"index,label,clean_label\n{rows}\n")
    with pytest.warns(DataWarning):
        after = open_data(arrays, labels=str(tmp_path / "a.csv")).train
    left = torch.tensor([k for k in range(COUNT) if k != 1])
    assert after.clean_labels is not None
    assert torch.equal(after.labels, left % 3)
    assert torch.equal(after.clean_labels, (left + 1) % 3)
