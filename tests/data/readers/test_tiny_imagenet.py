"""Tiny ImageNet in its own layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tadperf.data.open import open_data
from tadperf.errors import UserError

IDS = ("n01443537", "n01629819", "n02123045")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Returns a set of three classes. Training image k of class c has the value 50 c + k, image k of val has k."""
    root = tmp_path / "tiny-imagenet-200"
    for c, name in enumerate(IDS):
        (root / "train" / name / "images").mkdir(parents=True)
        for k in range(2):
            image = Image.fromarray(np.full((8, 8), 50 * c + k, np.uint8))
            image.save(root / "train" / name / "images" / f"{name}_{k}.JPEG", quality=100)
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t7\t7\n")
    for part in ("val", "test"):
        (root / part / "images").mkdir(parents=True)
    for k in range(4):
        Image.fromarray(np.full((8, 8), k, np.uint8)).save(root / "val" / "images" / f"val_{k}.JPEG", quality=100)
    lines = [f"val_{k}.JPEG\t{IDS[c]}\t0\t0\t7\t7" for k, c in ((3, 0), (1, 2), (0, 1), (2, 2))]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    words = [f"{IDS[0]}\tgoldfish, Carassius auratus", f"{IDS[1]}\tcat", f"{IDS[2]}\tcat, tabby", "n99\tother"]
    (root / "words.txt").write_text("\n".join(words))
    (root / "wnids.txt").write_text("\n".join(reversed(IDS)))
    return root


def test_the_published_layout(folder):
    train, test = open_data(folder)
    assert train.class_names == ("goldfish", f"cat ({IDS[1]})", f"cat ({IDS[2]})")
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 50, 51, 100, 101]
    assert train.file_names is not None
    assert train.file_names[0] == f"train/{IDS[0]}/images/{IDS[0]}_0.JPEG"
    assert test is not None
    assert (test.images[:, 0, 0, 0].tolist(), test.labels.tolist()) == ([0, 1, 2, 3], [1, 2, 2, 0])
    assert open_data(folder.parent).train.fingerprint == train.fingerprint  # one level up, as it is unpacked
    (folder / "words.txt").unlink()
    assert open_data(folder).train.class_names == IDS


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (
            "val/val_annotations.txt",
            "../../secret.JPEG\tn01443537\n",
            r"line 1: '\.\./\.\./secret\.JPEG' is no image in",
        ),
        ("val/val_annotations.txt", "val_0.JPEG\n", r"line 1: 'val_0\.JPEG' is no image in"),
        ("val/val_annotations.txt", "val_0.JPEG\tn5\n", "line 1: 'n5' is no folder of train"),
        ("val/val_annotations.txt", "val_0.JPEG\tn01443537\n", r"val_1\.JPEG: has no line in val_annotations\.txt"),
        ("val/val_annotations.txt", "\udcff", "not a valid text file in UTF-8"),
        ("words.txt", "\udcff", "not a valid text file in UTF-8"),
    ],
)
def test_a_damaged_set_is_refused(folder, file, change, words):
    (folder / file).write_bytes(change.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=words):
        open_data(folder)


def test_a_set_without_training_images_is_refused(folder):
    for image in (folder / "train").rglob("*.JPEG"):
        image.unlink()
    with pytest.raises(UserError, match="train: holds no image"):
        open_data(folder)
