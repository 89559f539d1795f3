"""`--skip-broken`: a run goes on without the images that cannot be decoded, and lists them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path) -> Path:
    """An image folder of two classes with 12 training images and 4 test images each. Two training images are broken."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for c, name in enumerate("ab"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for k in range(count):
                image = rng.integers(0, 100, (8, 8), np.uint8) + 100 * c
                Image.fromarray(image.astype(np.uint8)).save(tmp_path / "set" / split / name / f"{k:02}.png")
    for name in ("a/03.png", "b/11.png"):
        (tmp_path / "set" / "train" / name).write_bytes(b"junk")
    return tmp_path / "set"


def test_distill_and_audit(tadperf, tiny, folder, tmp_path):
    refused = tadperf("distill", folder, *tiny, "--out", "run")
    assert refused.code == 2
    assert "2 images: cannot be decoded: " in refused.err
    assert "03.png (unknown format)" in refused.err
    assert refused.err.rstrip().endswith("leave them out with --skip-broken")
    done = tadperf("distill", folder, *tiny, "--out", "run", "--skip-broken")
    assert done.code == 0, done.err
    assert "2 of 24 images of the train split cannot be decoded and are left out" in done.err
    listed = list(csv.DictReader((tmp_path / "run" / "broken.csv").read_text().splitlines()))
    assert [row["file"] for row in listed] == ["train/a/03.png", "train/b/11.png"]
    assert len((tmp_path / "run" / "labels.csv").read_text().splitlines()) == 1 + 22
    assert tadperf("evaluate", "run", "--repeats=1", "--device=cpu").code == 0
    options = [option for option in tiny if option.startswith(("--device", "--set=trust", "--set=net"))]
    audit = tadperf("audit", folder, *options, "--skip-broken", "--quiet", "--json", "--out", "labels.csv")
    assert audit.code == 0, audit.err
    result = json.loads(audit.out)
    assert result["samples"] == 22
    assert result["paths"]["broken"] == "labels.broken.csv"
    assert "train/a/03.png" in (tmp_path / "labels.broken.csv").read_text()
