"""`tadperf audit` with --features, --probs and --encoder: with and without images, and wrong use."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

NAMES = np.array(["ant", "bee", "cat"])


@pytest.fixture
def files(tmp_path) -> np.ndarray:
    """Writes F.npy, P.npy and L.csv for 600 documents of three classes; returns which labels are wrong."""
    rng = np.random.default_rng(0)
    clean = np.arange(600) % 3
    centres = rng.normal(size=(3, 8)) * 3
    z = centres[clean] + rng.normal(size=(600, 8))
    logits = -((z[:, None] - centres[None]) ** 2).sum(2) / 2
    wrong = rng.random(600) < 0.15
    labels = np.where(wrong, (clean + rng.integers(1, 3, 600)) % 3, clean)
    p = np.exp(logits - logits.max(1, keepdims=True))
    np.save(tmp_path / "F.npy", z.astype(np.float16))
    np.save(tmp_path / "P.npy", p / p.sum(1, keepdims=True))
    np.save(tmp_path / "logits.npy", logits)
    np.save(tmp_path / "short.npy", z[:-1])
    rows = [f"doc {k},text,{NAMES[label]}\n" for k, label in enumerate(labels)]
    (tmp_path / "L.csv").write_text("id,text,label\n" + "".join(rows))
    return wrong


@pytest.mark.parametrize("options", ["--features F.npy", "--probs P.npy", "--features F.npy --probs P.npy"])
def test_an_audit_without_images(tadperf, tmp_path, files, options):
    code, out, err = tadperf("audit", *options.split(), "--labels", "L.csv", "--json", "--out", "list.csv", "--quiet")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["data"], result["samples"], result["noise"]) == ("L", 600, "none")
    rows = list(csv.DictReader((tmp_path / "list.csv").read_text().splitlines()))
    found = np.zeros(600, bool)
    for row in rows:
        assert row["file"] == f"doc {row['index']}"
        found[int(row["index"])] = row["verdict"] in ("untrusted", "relabelled")
    assert found.sum() == result["issues"] == sum(pair["samples"] for pair in result["pairs"])
    assert (found & files).sum() / found.sum() > 0.9
    assert (found & files).sum() / files.sum() > 0.9
    assert result["worst"][0]["file"].startswith("doc ")
    assert {row["given_label"] for row in rows} == set(NAMES)
    assert "picture" not in result["paths"]
    assert not (tmp_path / "list.png").exists()


def test_the_list_can_be_given_back_and_leaves_out_what_it_does_not_trust(tadperf, tmp_path, files):
    first = tadperf("audit", "--features", "F.npy", "--labels", "L.csv", "--out", "list.csv")
    assert first.code == 0
    assert "no picture: this audit has no images" in first.err
    assert "suspected label errors among 600 labels" in first.out
    assert "worst samples (file)" in first.out
    code, out, err = tadperf("audit", "--features", "F.npy", "--labels", "list.csv", "--out", "kept.parquet", "--json")
    assert code == 0
    assert "samples have an empty label and are left out" in err
    table = pq.read_table(tmp_path / "kept.parquet")
    empty = sum(row["label"] == "" for row in csv.DictReader((tmp_path / "list.csv").read_text().splitlines()))
    assert 0 < empty == 600 - table.num_rows
    assert table.num_rows == json.loads(out)["samples"]
    assert table.column_names[:3] == ["file", "index", "verdict"]


def test_features_with_images_train_no_network_unless_asked(tadperf, tmp_path):
    from tadperf.data.open import open_data

    train = open_data("digits").train
    np.save(tmp_path / "F.npy", train.images.flatten(1).numpy().astype(np.float32))
    quick = ["--device=cpu", "--set=trust.rounds=1", "--set=trust.proxies=2", "--set=trust.epochs=1", "--json"]
    cheap = tadperf("audit", "digits", "--features", "F.npy", "--out", "list.csv", *quick)
    assert cheap.code == 0, cheap.err
    assert "trust 1/1" not in cheap.err
    result = json.loads(cheap.out)
    assert result["against_clean_labels"]["issue_precision"] > 0.9
    assert (tmp_path / "list.png").exists()
    full = tadperf("audit", "digits", "--features", "F.npy", "--dual-loop", *quick)
    assert full.code == 0, full.err
    assert "trust 1/1" in full.err
    assert json.loads(full.out)["samples"] == 1400


def test_an_encoder_computes_features_of_the_images(tadperf, tmp_path, monkeypatch):
    """A random network: its features are poor, but they say something about digits."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=4), add_pooling_layer=False)
    model.save_pretrained(tmp_path / "vit")
    content = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(content))
    code, out, err = tadperf("audit", "digits", "--encoder", "vit", "--device=cpu", "--json")
    assert code == 0, err
    assert "computing features 1400/1400" in err
    assert all(line.startswith(("computing features", "features: probe", "the operators")) for line in err.splitlines())
    assert json.loads(out)["against_clean_labels"]["issue_precision"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--probs logits.npy --labels L.csv", "--probs: {}/logits.npy: holds "),
        ("--features short.npy --labels L.csv", "--labels: L.csv: has 600 labels for 599 rows; must have one label"),
        ("--features F.npy --probs short.npy --labels L.csv", "--probs: {}/short.npy: holds "),
        ("--features short.npy --probs P.npy --labels L.csv", "--features: {}/short.npy: has 599 rows; L has 600 samp"),
        ("--features none.npy --labels L.csv", "--features: {}/none.npy: no such file"),
        ("--features F.npy", "--features: {}/F.npy: needs the labels of its rows; give --labels FILE, or DATA"),
        ("--encoder e --labels L.csv", "--encoder: {}/e: computes features of images; name DATA"),
        ("--features F.npy --labels L.csv --noise symmetric:0.1", "--noise: symmetric:0.1: needs a set of images"),
        ("--features F.npy --labels L.csv --image-size 8", "--image-size: 8: needs a set of images; name DATA"),
        ("--features F.npy --labels L.csv --dual-loop", "--dual-loop: no images: trains networks on images; name DATA"),
        ("digits --features F.npy", "--features: {}/F.npy: has 600 rows; digits has 1400 samples"),
        ("digits --encoder e", "--encoder: {}/e: no such folder; name a local folder with config.json"),
    ],
)
def test_wrong_use(tadperf, tmp_path, files, arguments, line):
    before = sorted(tmp_path.iterdir())
    code, out, err = tadperf("audit", *arguments.split(), "--quiet", "--out", "list.csv")
    assert (code, out) == (2, "")
    assert err.startswith("tadperf: " + line.format(Path(tmp_path).resolve()))
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
