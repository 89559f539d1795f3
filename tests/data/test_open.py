from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tadperf.data.open import open_data, open_test_split
from tadperf.errors import DataWarning, UserError


def test_digits_are_those_of_scikit_learn_scaled_to_bytes_in_a_fixed_split():
    train, test = open_data("digits")
    assert test is not None
    assert (len(train), len(test), train.shape) == (1400, 397, (1, 8, 8))
    values, classes = load_digits(return_X_y=True)
    expected = sorted((tuple(round(v * 255 / 16) for v in row), int(c)) for row, c in zip(values, classes, strict=True))
    opened = [
        (tuple(image.flatten().tolist()), int(label))
        for split in (train, test)
        for image, label in zip(split.images, split.labels, strict=True)
    ]
    assert sorted(opened) == expected  # every digit is in one of the splits, once
    share = train.labels.bincount() / torch.from_numpy(np.bincount(classes)) * 1797 / 1400
    assert share.sub(1).abs().max() < 0.01
    assert train.fingerprint == "e68d69efab014a33ae06a5e4dce3eca1"  # frozen: figures in reports depend on this split
    assert test.fingerprint == "18e86910513ed5d6bc304ed0c384a703"
    assert train.clean_labels is None


def test_the_test_split_can_be_read_alone():
    both, alone = open_data("digits"), open_test_split("digits")
    assert both.test is not None
    assert alone is not None
    assert alone.fingerprint == both.test.fingerprint


def test_image_size_resizes_as_pillow_does():
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
        ({"path": "https://example.com/photos.zip"}, "data", "is a URL, and tadperf opens files; download the data"),
        ({"format": "tfrecord"}, "format", "choose one of digits, parquet, .*folder, table, .*npz, safetensors, idx"),
        ({"image_size": 0}, "image_size", "at least 1"),
    ],
)
def test_wrong_calls(call, field, words):
    with pytest.raises(UserError, match=words) as caught:
        open_data(**call)
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_a_file_of_unknown_kind_names_the_formats(tmp_path):
    (tmp_path / "set.h5").write_bytes(b"x")
    with pytest.raises(UserError, match="unknown format; choose one with format: digits, parquet"):
        open_data(tmp_path / "set.h5")


def test_an_archive_of_images_is_to_be_unpacked(tmp_path):
    (tmp_path / "photos.ZIP").write_bytes(b"PK")
    with pytest.raises(UserError, match="is an archive; unpack it, and name the folder"):
        open_data(tmp_path / "photos.ZIP")


def test_folders_without_images_beside_the_classes_are_skipped(tmp_path, pixels):
    for k, name in enumerate(("pizza", "soup")):  # as Food-101 comes: images/<class>/*.jpg and meta/train.txt
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(pixels[k]).save(tmp_path / "images" / name / f"{k}.png")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "train.txt").write_text("pizza/0")
    with pytest.warns(DataWarning, match="1 folders without images are not used: meta"):
        train = open_data(tmp_path).train
    assert train.class_names == ("pizza", "soup")
    assert train.file_names == ("images/pizza/0.png", "images/soup/1.png")


def cifar100(folder, count=200):
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        data = np.full((count, 3072), len(name), np.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": data, b"fine_labels": [k % 100 for k in range(count)]}))


def mnist(folder):
    folder.mkdir(parents=True)
    for prefix, count in (("train", 4), ("t10k", 2)):
        for content, shape in (("images-idx3", (count, 5, 5)), ("labels-idx1", (count,))):
            sizes = b"".join(size.to_bytes(4, "big") for size in shape)
            data = bytes(k % 2 for k in range(int(np.prod(shape))))
            (folder / f"{prefix}-{content}-ubyte").write_bytes(bytes((0, 0, 8, len(shape))) + sizes + data)


def test_torchvisions_folders_are_found_below_their_root(tmp_path):
    cifar100(tmp_path / "one" / "cifar-100-python")  # without the file meta
    train = open_data(tmp_path / "one").train
    assert (len(train), train.num_classes) == (200, 100)
    assert train.source["path"] == str(tmp_path / "one" / "cifar-100-python")
    mnist(tmp_path / "two" / "MNIST" / "raw")
    assert len(open_data(tmp_path / "two").train) == 4
    assert len(open_data(tmp_path / "two" / "MNIST").train) == 4
    cifar100(tmp_path / "two" / "cifar-100-python")
    with pytest.raises(UserError, match=r"several data sets: MNIST/raw, cifar-100-python; name one of these folders"):
        open_data(tmp_path / "two")


def test_folders_around_the_class_folders_are_skipped_and_one_class_is_refused(tmp_path, pixels):
    for name in ("a", "b"):
        (tmp_path / "x" / "y" / "z" / "images" / name).mkdir(parents=True)
        Image.fromarray(pixels[0]).save(tmp_path / "x" / "y" / "z" / "images" / name / "0.png")
    assert len(open_data(tmp_path / "x" / "y").train) == 2
    with pytest.raises(UserError, match="only one class, 'images'; put the images of each class"):
        open_data(tmp_path / "x")
    (tmp_path / "one" / "disc").mkdir(parents=True)
    Image.fromarray(pixels[0]).save(tmp_path / "one" / "disc" / "0.png")
    with pytest.raises(UserError, match=r"only one class, 'disc'; put the images of each class into a folder"):
        open_data(tmp_path / "one")
    np.savez(tmp_path / "one.npz", images=pixels, labels=np.zeros(12, int))
    with pytest.raises(UserError, match="only one class, '0'; put the images"):
        open_data(tmp_path / "one.npz")


def test_errors_of_the_file_system_name_the_file(tmp_path, pixels, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(pixels[0]).save(tmp_path / name / "0.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("tadperf.data.walk.os.scandir", refuse)
    with pytest.raises(UserError, match=r"^data: .*: Permission denied; check the file and its permissions$"):
        open_data(tmp_path)


def test_a_set_of_small_images_makes_no_cache_folder(tmp_path, pixels, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(pixels[0]).save(tmp_path / "set" / name / "0.png")
    open_data(tmp_path / "set", image_size=4)
    assert not (tmp_path / "cache").exists()


def test_a_wrong_format_is_refused(tmp_path, pixels, classes):
    np.savez(tmp_path / "set.npz", images=pixels, labels=classes)
    for other in ("parquet", "folder", "cifar", "safetensors", "idx"):
        with pytest.raises(UserError):
            open_data(tmp_path / "set.npz", format=other)


def test_a_class_without_a_training_sample_is_named(tmp_path, pixels, classes):
    names = np.array(["ant", "bee", "cat", "dog"])
    np.savez(tmp_path / "set.npz", images=pixels, labels=classes, class_names=names)
    with pytest.raises(UserError, match="class 'dog' has no training sample"):
        open_data(tmp_path / "set.npz")


def test_a_class_without_samples_under_new_labels_is_named(tmp_path, pixels, classes):
    np.savez(tmp_path / "set.npz", images=pixels, labels=classes)
    np.save(tmp_path / "noisy.npy", np.minimum(classes, 1))
    with pytest.raises(UserError, match="class '2' has no training sample"):
        open_data(tmp_path / "set.npz", labels=str(tmp_path / "noisy.npy"))


def test_a_set_with_only_a_test_split(tmp_path, pixels, classes):
    np.savez(tmp_path / "set.npz", x_test=pixels, y_test=classes)
    with pytest.raises(UserError, match="no train split"):
        open_data(tmp_path / "set.npz")
    test = open_test_split(tmp_path / "set.npz")
    assert test is not None
    assert len(test) == 12


def test_splits_of_two_sizes(tmp_path, pixels, classes):
    path = tmp_path / "set.npz"
    np.savez(path, x_train=pixels, y_train=classes, x_test=pixels[:, :6], y_test=classes)
    with pytest.raises(UserError, match="8 x 8 and 6 x 8; give image_size"):
        open_data(path)
    test = open_data(path, image_size=6).test
    assert test is not None
    assert test.shape == (3, 6, 6)


def test_a_grey_split_becomes_colour_if_the_other_is(tmp_path, pixels, classes):
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
