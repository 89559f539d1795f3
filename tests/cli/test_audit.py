"""`tadperf audit`: its output, its files, and wrong use."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tadperf.cli.tables import print_audit

FAST = ["--device=cpu", "--quiet", *(f"--set=trust.{s}" for s in ("rounds=1", "proxies=2", "epochs=4"))]


def test_list_picture_and_summary(tadperf, tmp_path):
    code, out, err = tadperf("audit", "digits", *FAST, "--out", "labels.csv", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    rows = list(csv.DictReader((tmp_path / "labels.csv").read_text().splitlines()))
    assert len(rows) == result["samples"] == 1400
    assert sorted(int(row["index"]) for row in rows) == list(range(1400))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    issues = [row for row in rows if row["verdict"] in ("relabelled", "untrusted")]
    assert len(issues) == result["issues"] > 300  # 40 % of the labels of the default job are wrong
    first = [{"index": int(row["index"]), "given": row["given_label"]} for row in issues[:10]]
    assert first == [{"index": worst["index"], "given": worst["given"]} for worst in result["worst"]]
    assert sum(pair["samples"] for pair in result["pairs"]) <= result["issues"]
    assert result["against_clean_labels"]["issue_precision"] > 0.9
    with Image.open(tmp_path / "labels.png") as picture:
        assert picture.width > 800
    refused = tadperf("audit", "digits", *FAST, "--out", "labels.csv")
    assert refused.code == 2
    assert refused.err == "tadperf: --out: labels.csv: exists already; choose another name\n"
    text = tadperf("audit", "digits", *FAST, "--out", "labels.parquet")  # its picture would replace the first one
    assert text.code == 2


def test_tables_and_parquet(tadperf, tmp_path):
    code, out, _ = tadperf("audit", "digits", "--noise=none", *FAST, "--out", "kept.parquet")
    assert code == 0
    assert "suspected label errors among 1400 labels" in out
    assert "kept.png" in out
    table = pq.read_table(tmp_path / "kept.parquet")
    assert table.num_rows == 1400
    assert table.column_names[:3] == ["index", "verdict", "score"]


def test_class_names_change_nothing_around_them(capsys):
    names = ["[red]cat", "a\u202eb", "c\nd", "plain"]
    pairs = [{"suggested": name, "given": "plain", "samples": 7} for name in names]
    values = {"noise": "none", "data": "set", "samples": 9, "issues": 4, "pairs": pairs, "worst": [], "paths": {}}
    print_audit(values)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.rstrip().endswith(" 7")]
    assert rows == [[*shown.split(), "plain", "7"] for shown in ("[red]cat", "a\ufffdb", "c d", "plain")]


def test_the_worst_samples_of_a_folder_are_named_by_their_files(tadperf, tmp_path):
    rng = np.random.default_rng(0)
    for k in range(40):
        folder = tmp_path / "set" / "ab"[k % 2 if k != 6 else 1]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 60, (8, 8)) + 150 * (k % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    code, out, err = tadperf("audit", "set", *FAST, "--out", "list.csv", "--json")
    assert code == 0, err
    worst = json.loads(out)["worst"][0]
    assert worst["file"] == "b/6.png"
    rows = list(csv.DictReader((tmp_path / "list.csv").read_text().splitlines()))
    assert (rows[0]["file"], int(rows[0]["index"])) == ("b/6.png", worst["index"])
    shown = tadperf("audit", "set", *FAST)
    assert "worst samples (file)" in shown.out
    assert "b/6.png" in shown.out
    assert tadperf("audit", "set", *FAST, "--labels", "list.csv").code == 0


def test_a_folder_that_cannot_be_written_is_refused_before_the_audit(tadperf, tmp_path, monkeypatch):
    from tadperf.pipeline import audit

    monkeypatch.setattr(audit.os, "access", lambda path, mode: Path(path) != tmp_path)
    code, out, err = tadperf("audit", "digits", "--out", "labels.csv")
    assert (code, out) == (2, "")
    assert err == "tadperf: --out: labels.csv: its folder cannot be written; choose another\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--out labels.txt", "--out: labels.txt: must end in .csv or .parquet"),
        ("--out nowhere/labels.csv", "--out: nowhere/labels.csv: its folder does not exist; make it first"),
        ("--noise loud:1", "--noise"),
        ("--set trust.rounds=0", "trust.rounds: 0: "),
    ],
)
def test_wrong_use(tadperf, tmp_path, arguments, line):
    code, out, err = tadperf("audit", *arguments.split())
    assert (code, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
