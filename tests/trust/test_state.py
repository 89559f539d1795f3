"""TrustState: its view, its counts and its files."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tadperf.errors import UserError
from tadperf.trust.metrics import compare_with_clean, round_metrics
from tadperf.trust.state import TrustState, as_given

NAMES = ("cat", "dog", "it's, a bird")


def state() -> TrustState:
    """One sample for each verdict, and a second trusted one."""
    return TrustState(
        torch.tensor([0, 1, 2, 1, 0]),
        torch.tensor([0, 1, 0, 1, 0]),
        torch.tensor([0, 1, 2, 3, 0], dtype=torch.uint8),
        torch.tensor([1.0, 0.5, 0.75, 0.0, 0.25]),
        torch.tensor([1, 2, 2, 1, 1], dtype=torch.int16),
        torch.tensor([0.1, 0.2, 0.9, 0.8, 0.1]),
        torch.tensor([0, 1, 0, 2, 0]),
        NAMES,
    )


def test_view_counts_and_pairs_by_hand():
    view = state().view()
    assert view.index.tolist() == [0, 1, 2, 4]
    assert view.labels.tolist() == [0, 1, 0, 0]
    assert view.weights.tolist() == [1.0, 0.5, 0.75, 0.25]
    assert state().trusted.tolist() == [True, True, True, False, True]
    assert state().issues.tolist() == [False, False, True, True, False]
    assert state().counts() == {
        "trusted": [2, 0, 0],
        "recalled": [0, 1, 0],
        "relabelled": [0, 0, 1],
        "untrusted": [0, 1, 0],
    }
    assert sorted(state().pairs()) == [("cat", "it's, a bird", 1), ("it's, a bird", "dog", 1)]
    assert state().worst().tolist() == [2, 3, 1, 0, 4]
    assert repr(state()) == "TrustState(5 labels of 3 classes: 2 trusted, 1 recalled, 1 relabelled, 1 untrusted)"


def test_saved_and_loaded(tmp_path):
    state().save(tmp_path / "trust.safetensors")
    loaded = TrustState.load(tmp_path / "trust.safetensors")
    assert loaded.class_names == NAMES
    for name, value in vars(state()).items():
        if name != "class_names":
            assert torch.equal(getattr(loaded, name), value)
    first = (tmp_path / "trust.safetensors").read_bytes()
    state().save(tmp_path / "trust.safetensors")
    assert (tmp_path / "trust.safetensors").read_bytes() == first


def test_another_or_incomplete_file_is_refused(tmp_path):
    from tadperf.files import save_tensors

    file = tmp_path / "x.safetensors"
    save_tensors(file, {"given": torch.zeros(3)})
    with pytest.raises(UserError, match="not a trust file of schema 1"):
        TrustState.load(file)
    save_tensors(file, {"given": torch.zeros(3, dtype=torch.int64)}, {"tadperf_trust": "1", "class_names": "[]"})
    with pytest.raises(UserError, match="is damaged: 'working' is missing"):
        TrustState.load(file)
    with pytest.raises(UserError, match="no such file"):
        TrustState.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"given": torch.zeros(5)}, r"given: float32 \[5\]: must be int64 \[5\]"),
        ({"score": torch.zeros(4)}, r"score: float32 \[4\]: must be float32 \[5\]"),
        ({"working": torch.tensor([0, 1, 3, 1, 0])}, r"working: 3 at sample 2: must be in 0\.\.2"),
        ({"suggested": torch.tensor([0, -1, 0, 2, 0])}, r"suggested: -1 at sample 1: must be in 0\.\.2"),
        ({"verdict": torch.full((5,), 4, dtype=torch.uint8)}, r"verdict: 4 at sample 0: must be in 0\.\.3"),
        ({"reliability": torch.full((5,), math.nan)}, r"reliability: nan at sample 0: must be in \[0, 1\]"),
        ({"class_names": ("cat", "dog")}, r"given: 2 at sample 2: must be in 0\.\.1"),
    ],
)
def test_wrong_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(state(), **changes)


def test_a_mutated_file_is_read_or_refused_in_one_line(tmp_path):
    """600 files with one to eight random bytes changed: each gives a valid state or a UserError of one line."""
    file = tmp_path / "trust.safetensors"
    state().save(file)
    original, random = file.read_bytes(), Random(0)
    messages = []
    for _ in range(600):
        mutated = bytearray(original)
        for _ in range(random.randint(1, 8)):
            mutated[random.randrange(len(mutated))] = random.randrange(256)
        file.write_bytes(mutated)
        try:
            loaded = TrustState.load(file)
        except UserError as error:
            messages.append(str(error))
        else:
            loaded.table()
            loaded.pairs()
    assert not any("\n" in message for message in messages)
    assert 300 < len(messages) < 600


def test_export_writes_the_most_suspicious_sample_first(tmp_path):
    state().export(tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == ["2", "3", "1", "0", "4"]
    assert rows[0]["given_label"] == "it's, a bird"
    assert (rows[0]["verdict"], rows[0]["suggested_label"], rows[0]["label"]) == ("relabelled", "cat", "cat")
    assert (rows[1]["verdict"], rows[1]["suggested_label"], rows[1]["label"]) == ("untrusted", "it's, a bird", "")
    state().export(tmp_path / "labels.parquet")
    table = pq.read_table(tmp_path / "labels.parquet").to_pydict()
    assert table["index"] == [2, 3, 1, 0, 4]
    assert table["label"][1] is None
    assert list(table) == list(rows[0])
    with pytest.raises(UserError, match=r"must end in \.csv or \.parquet"):
        state().export(tmp_path / "labels.txt")


def test_as_given_and_oracle():
    labels, clean = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2])
    off, oracle = as_given(labels, NAMES), as_given(labels, NAMES, clean)
    assert off.view().index.tolist() == [0, 1, 2, 3]
    assert oracle.view().index.tolist() == [0, 1, 3]
    assert oracle.pairs() == [("dog", "it's, a bird", 1)]


def test_comparison_with_clean_labels():
    figures = compare_with_clean(state(), torch.tensor([0, 1, 0, 2, 1]))
    assert figures == {
        "view_accuracy": 0.75,
        "coverage": pytest.approx(0.8),
        "precision": 0.5,
        "recall": 0.5,
        "recalled_accuracy": 1.0,
        "relabel_accuracy": 1.0,
        "issue_precision": 1.0,
        "issue_recall": pytest.approx(2 / 3),
        "suggested_accuracy": 0.8,
    }
    no_relabels = compare_with_clean(
        as_given(torch.zeros(2, dtype=torch.int64), NAMES), torch.zeros(2, dtype=torch.int64)
    )
    assert math.isnan(no_relabels["relabel_accuracy"])
    assert compare_with_clean(state(), np.array([0, 1, 0, 2, 1])[::-1][::-1]) == figures
    with pytest.raises(ValueError, match=r"clean: int64 \[2\]: must be integers \[5\]"):
        compare_with_clean(state(), [0, 1])
    log = round_metrics([state(), state()])
    assert [entry["round"] for entry in log] == [1, 2]
    assert "precision" not in log[0]
