"""The state of trust: its view, its counts, its files."""

from __future__ import annotations

import csv
import math

import pyarrow.parquet as pq
import pytest
import torch

from tadperf.errors import UserError
from tadperf.trust import metrics
from tadperf.trust.metrics import round_metrics
from tadperf.trust.state import TrustState, as_given

NAMES = ("cat", "dog", "it's, a bird")


def state() -> TrustState:
    """One sample of each verdict, and one more trusted."""
    return TrustState(
        torch.tensor([0, 1, 2, 1, 0]), torch.tensor([0, 1, 0, 1, 0]),
        torch.tensor([0, 1, 2, 3, 0], dtype=torch.uint8), torch.tensor([1.0, 0.5, 0.75, 0.0, 0.25]),
        torch.tensor([1, 2, 2, 1, 1], dtype=torch.int16), torch.tensor([0.1, 0.2, 0.9, 0.8, 0.1]),
        torch.tensor([0, 1, 0, 2, 0]), NAMES,
    )  # fmt: skip


def test_view_counts_and_pairs():
    view = state().view()
    assert view.index.tolist() == [0, 1, 2, 4]
    assert view.labels.tolist() == [0, 1, 0, 0]
    assert view.weights.tolist() == [1.0, 0.5, 0.75, 0.25]
    assert state().trusted.tolist() == [True, True, True, False, True]
    assert state().issues.tolist() == [False, False, True, True, False]
    assert state().counts() == {
        "trusted": [2, 0, 0], "recalled": [0, 1, 0], "relabelled": [0, 0, 1], "untrusted": [0, 1, 0]
    }  # fmt: skip
    assert sorted(state().pairs()) == [("cat", "it's, a bird", 1), ("it's, a bird", "dog", 1)]
    assert state().worst().tolist() == [2, 3, 1, 0, 4]


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


def test_a_foreign_or_damaged_file_is_refused(tmp_path):
    from tadperf.files import save_tensors

    file = tmp_path / "x.safetensors"
    save_tensors(file, {"given": torch.zeros(3)})
    with pytest.raises(UserError, match="is no trust file of schema 1"):
        TrustState.load(file)
    save_tensors(file, {"given": torch.zeros(3, dtype=torch.int64)}, {"tadperf_trust": "1", "class_names": "[]"})
    with pytest.raises(UserError, match="its 'working' is missing or of a wrong type or length"):
        TrustState.load(file)
    with pytest.raises(UserError, match="there is no such file"):
        TrustState.load(tmp_path / "none")


def test_exported_worst_first(tmp_path):
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


def test_figures_against_the_truth():
    figures = metrics(state(), torch.tensor([0, 1, 0, 2, 1]))
    assert figures == {
        "view_accuracy": 0.75, "coverage": pytest.approx(0.8), "precision": 0.5, "recall": 0.5,
        "recalled_accuracy": 1.0, "relabel_accuracy": 1.0, "issue_precision": 1.0,
        "issue_recall": pytest.approx(2 / 3), "suggested_accuracy": 0.8,
    }  # fmt: skip
    nothing = metrics(as_given(torch.zeros(2, dtype=torch.int64), NAMES), torch.zeros(2, dtype=torch.int64))
    assert math.isnan(nothing["relabel_accuracy"])
    log = round_metrics([state(), state()])
    assert [entry["round"] for entry in log] == [1, 2]
    assert "precision" not in log[0]
