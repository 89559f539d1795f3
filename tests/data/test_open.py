from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from tadperf.data.open import open_data
from tadperf.errors import UserError


def test_digits_are_sklearns_scaled_to_bytes_and_split_for_good():
    train, test = open_data("digits")
    assert test is not None
    assert (len(train), len(test), train.shape) == (1400, 397, (1, 8, 8))
    values, classes = load_digits(return_X_y=True)
    whole = sorted((tuple(round(v * 255 / 16) for v in row), int(c)) for row, c in zip(values, classes, strict=True))
    opened = [
        (tuple(image.flatten().tolist()), int(label))
        for split in (train, test)
        for image, label in zip(split.images, split.labels, strict=True)
    ]
    assert sorted(opened) == whole  # every digit once, in one of the splits
    share = train.labels.bincount() / torch.from_numpy(np.bincount(classes)) * 1797 / 1400
    assert share.sub(1).abs().max() < 0.01
    assert train.fingerprint == "e68d69efab014a33ae06a5e4dce3eca1"  # frozen: figures in reports depend on this split
    assert test.fingerprint == "18e86910513ed5d6bc304ed0c384a703"
    assert train.clean_labels is None


def test_the_test_split_alone():
    both, alone = open_data("digits"), open_data("digits", need_train=False)
    assert alone.train is None
    assert both.test is not None
    assert alone.test is not None
    assert alone.test.fingerprint == both.test.fingerprint


def test_image_size_resizes_as_pillow_does():
    from PIL import Image

    plain, small = open_data("digits").train, open_data("digits", image_size=5).train
    assert small.shape == (1, 5, 5)
    expected = Image.fromarray(plain.images[7, 0].numpy()).resize((5, 5), Image.Resampling.BICUBIC)
    assert torch.equal(small.images[7, 0], torch.from_numpy(np.array(expected)))


def test_source_reopens_the_same_set(tmp_path, monkeypatch, pixels, classes):
    monkeypatch.chdir(tmp_path)
    np.savez("set.npz", images=pixels, labels=classes)
    np.save("noisy.npy", np.roll(classes, 1))
    train, test = open_data("set.npz", image_size=6, labels="noisy.npy")
    assert test is None
    source = train.source
    assert (source["format"], source["split"], source["image_size"]) == ("npz", "train", 6)
    monkeypatch.chdir("/")
    again = open_data(source["path"], format=source["format"], image_size=source["image_size"], labels=source["labels"])
    assert again.train.fingerprint == train.fingerprint


@pytest.mark.parametrize(
    ("call", "field", "words"),
    [
        ({"path": "/nowhere/at/all"}, "data", "no such file"),
        ({"format": "tfrecord"}, "--format", "digits, parquet, folder, cifar, npz, safetensors, idx"),
        ({"image_size": 0}, "--image-size", "at least 1"),
    ],
)
def test_wrong_calls(call, field, words):
    with pytest.raises(UserError, match=words) as caught:
        open_data(**call)
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_a_file_of_unknown_kind_names_the_formats(tmp_path):
    (tmp_path / "set.h5").write_bytes(b"x")
    with pytest.raises(UserError, match="unknown format; choose one with --format: digits, parquet"):
        open_data(tmp_path / "set.h5")


def test_a_format_that_is_not_the_files(tmp_path, pixels, classes):
    np.savez(tmp_path / "set.npz", images=pixels, labels=classes)
    for other in ("parquet", "folder", "cifar", "safetensors", "idx"):
        with pytest.raises(UserError):
            open_data(tmp_path / "set.npz", format=other)


def test_a_class_without_a_training_sample_is_named(tmp_path, pixels, classes):
    names = np.array(["ant", "bee", "cat", "dog"])
    np.savez(tmp_path / "set.npz", images=pixels, labels=classes, class_names=names)
    with pytest.raises(UserError, match="class 'dog' has no training sample"):
        open_data(tmp_path / "set.npz")


def test_a_class_that_new_labels_leave_empty_is_named(tmp_path, pixels, classes):
    np.savez(tmp_path / "set.npz", images=pixels, labels=classes)
    np.save(tmp_path / "noisy.npy", np.minimum(classes, 1))
    with pytest.raises(UserError, match="class '2' has no training sample"):
        open_data(tmp_path / "set.npz", labels=str(tmp_path / "noisy.npy"))


def test_only_a_test_split(tmp_path, pixels, classes):
    np.savez(tmp_path / "set.npz", x_test=pixels, y_test=classes)
    with pytest.raises(UserError, match="no train split"):
        open_data(tmp_path / "set.npz")
    test = open_data(tmp_path / "set.npz", need_train=False).test
    assert test is not None
    assert len(test) == 12


def test_splits_of_two_sizes(tmp_path, pixels, classes):
    path = tmp_path / "set.npz"
    np.savez(path, x_train=pixels, y_train=classes, x_test=pixels[:, :6], y_test=classes)
    with pytest.raises(UserError, match="8 x 8 and 6 x 8; give --image-size"):
        open_data(path)
    test = open_data(path, image_size=6).test
    assert test is not None
    assert test.shape == (3, 6, 6)


def test_a_grey_split_follows_the_other_to_colour(tmp_path, pixels, classes):
    path = tmp_path / "set.npz"
    np.savez(path, x_train=pixels, y_train=classes, x_test=pixels[..., 0], y_test=classes)
    test = open_data(path).test
    assert test is not None
    assert torch.equal(test.images, torch.from_numpy(pixels[..., :1]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1))


def test_the_data_folder_does_not_import_heavy_readers():
    import subprocess
    import sys

    heavy = "sklearn", "pyarrow", "PIL", "pandas", "safetensors"
    code = f"import sys, tadperf.data; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
