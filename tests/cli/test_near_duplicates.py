"""`tadperf audit --near-duplicates`: the table, the JSON object, the CSV file and the page name the planted pairs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FAST = ["--device=cpu", "--quiet", *(f"--set=trust.{s}" for s in ("rounds=1", "proxies=2", "epochs=2"))]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes. b/copy.png equals a/0.png, a/again.jpg is a/2.png as JPEG, and 1.png is in both splits."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 6)):
        for k in range(count):
            place = tmp_path / "set" / split / "ab"[k % 2]
            place.mkdir(parents=True, exist_ok=True)
            colours = 0.8 * rng.integers(0, 256, (5, 5, 1)) + 0.2 * rng.integers(0, 256, (5, 5, 3))
            coarse = Image.fromarray(colours.astype(np.uint8))
            coarse.resize((24, 24), Image.Resampling.BICUBIC).save(place / f"{k}.png")
    train = tmp_path / "set" / "train"
    shutil.copy(train / "a" / "0.png", train / "b" / "copy.png")
    shutil.copy(train / "b" / "1.png", tmp_path / "set" / "test" / "b" / "1.png")
    Image.open(train / "a" / "2.png").save(train / "a" / "again.jpg", quality=75)
    return tmp_path / "set"


def test_every_output_names_the_pairs(tadperf, tmp_path, folder):
    code, out, err = tadperf("audit", "set", *FAST, "--near-duplicates", "--out", "list.csv", "--json")
    assert code == 0, err
    result = json.loads(out)
    found = result["near_duplicates"]
    counts = {name: found[name] for name in ("in_train", "different_labels", "exact", "leaks", "threshold")}
    assert counts == {"in_train": 2, "different_labels": 1, "exact": 2, "leaks": 1, "threshold": 0.98}
    assert result["paths"]["duplicates"] == "list.duplicates.csv"
    with (tmp_path / "list.duplicates.csv").open(newline="", encoding="utf-8") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows[0] == ("train", "true", "true", "1.0", "train/a/0.png", "a", "train/b/copy.png", "b")
    assert rows[1][:3] == ("train", "false", "false")
    assert rows[1][4:] == ("train/a/2.png", "a", "train/a/again.jpg", "a")
    assert rows[2] == ("leak", "false", "true", "1.0", "train/b/1.png", "b", "test/b/1.png", "b")
    page = (tmp_path / "list.html").read_text(encoding="utf-8")
    section = page.partition('id="duplicates"')[2].partition("</section>")[0]
    assert section.count("<img") == 6
    for text in ("different labels", "train and test", "exact copy", "train/b/copy.png", "train/a/again.jpg", "0.98"):
        assert text in section


def test_the_table(tadperf, folder):
    code, out, err = tadperf("audit", "set", *FAST, "--near-duplicates")
    assert code == 0, err
    found = "near duplicates: 2 pairs of training samples, 1 with different labels; 1 pairs of a training and a test"
    assert found in " ".join(out.split())  # the line is folded at 80 columns
    assert "train/b/copy.png" in out
    assert "test: test/b/1.png" in out


def test_without_images_features_are_compared(tadperf, tmp_path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 16)).astype(np.float32) + 3 * np.eye(16, dtype=np.float32)[np.arange(60) % 3]
    features[40] = features[1]
    np.save(tmp_path / "f.npy", features)
    np.save(tmp_path / "y.npy", np.arange(60) % 3)
    files = ["--features", "f.npy", "--labels", "y.npy"]
    code, out, err = tadperf("audit", *files, "--quiet", "--near-duplicates", "--out", "list.csv", "--json")
    assert code == 0, err
    found = json.loads(out)["near_duplicates"]
    assert (found["in_train"], found["leaks"], found["feature_threshold"]) == (1, None, 0.98)
    assert (found["pairs"][0]["first"], found["pairs"][0]["second"]) == ("row 1", "row 40")
    assert 'id="duplicates"' in (tmp_path / "list.html").read_text(encoding="utf-8")
