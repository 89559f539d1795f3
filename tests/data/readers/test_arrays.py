from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tadperf.data import mapped
from tadperf.data.open import open_data, open_test_split
from tadperf.errors import UserError

SPELLINGS = [("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels")]


@pytest.mark.parametrize("names", SPELLINGS)
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_both_splits(tmp_path, pixels, classes, names, kind):
    values = dict(zip(names, (pixels, classes[:, None], pixels[:3], classes[:3, None]), strict=True))
    path = tmp_path / f"set.{kind}"
    if kind == "npz":
        np.savez_compressed(path, **values)
    else:
        save_file({name: torch.from_numpy(value.copy()) for name, value in values.items()}, path)
    train, test = open_data(path)
    assert test is not None
    assert torch.equal(train.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert train.labels.tolist() == classes.tolist()
    assert torch.equal(test.images, train.images[:3])
    assert test.class_names == ("0", "1", "2")
    alone = open_test_split(path)
    assert alone is not None
    assert alone.class_names == ("0", "1", "2")


def test_layouts_and_floats_give_the_same_pixels(tmp_path, pixels, classes):
    chw = pixels.transpose(0, 3, 1, 2)
    expected = torch.from_numpy(chw.copy())
    for k, images in enumerate((pixels, chw, pixels / 255, chw.astype(np.float32) / 255, (pixels / 255).astype(">f8"))):
        np.savez(tmp_path / f"{k}.npz", x=images, y=classes.astype(np.uint8))
        assert torch.equal(open_data(tmp_path / f"{k}.npz").train.images, expected)
    np.savez(tmp_path / "grey.npz", images=pixels[..., 0], labels=classes)
    assert torch.equal(open_data(tmp_path / "grey.npz").train.images, expected[:, :1])
    save_file({"images": expected / 255, "labels": torch.from_numpy(classes)}, tmp_path / "f.safetensors")
    assert torch.equal(open_data(tmp_path / "f.safetensors").train.images, expected)
    half = {"images": (expected / 255).half(), "labels": torch.from_numpy(classes)}
    save_file(half, tmp_path / "h.safetensors")
    rounded = (half["images"].double() * 255).round().to(torch.uint8)
    assert torch.equal(open_data(tmp_path / "h.safetensors").train.images, rounded)


def test_class_names_and_clean_labels(tmp_path, pixels, classes):
    names, clean = ["ant", "bee", "cat"], np.roll(classes, 1)
    np.savez(tmp_path / "a.npz", images=pixels, labels=classes, clean_labels=clean, class_names=np.array(names))
    tensors = {
        "images": torch.from_numpy(pixels),
        "labels": torch.from_numpy(classes),
        "clean_labels": torch.from_numpy(clean),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"class_names": json.dumps(names)})
    np.savez(tmp_path / "text.npz", images=pixels, labels=np.array(names)[classes], clean_labels=np.array(names)[clean])
    for name in ("a.npz", "a.safetensors", "text.npz"):
        train = open_data(tmp_path / name).train
        assert train.class_names == tuple(names)
        assert train.clean_labels is not None
        assert train.clean_labels.tolist() == clean.tolist()
        assert train.labels.tolist() == classes.tolist()


def test_safetensors_images_stay_memory_mapped(tmp_path):
    path = tmp_path / "set.safetensors"
    images = torch.randint(256, (1000, 3, 8, 8), dtype=torch.uint8)
    save_file({"images": images, "labels": torch.arange(1000) % 2}, path)
    train = open_data(path).train
    address = train.images.data_ptr()
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(path))]
    assert any(int(low, 16) <= address < int(high, 16) for low, high in spans)
    assert torch.equal(train.images, images)


def refused(tmp_path, words, **arrays):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=words) as caught:
        open_data(tmp_path / "bad.npz")
    assert "\n" not in str(caught.value)


def test_npz_errors(tmp_path, pixels, classes):
    objects = np.array([{}, {}], dtype=object)
    refused(tmp_path, "bad.npz: images: holds pickled objects.*store plain arrays", images=objects, labels=classes[:2])
    refused(
        tmp_path,
        "bad.npz: labels: holds pickled objects.*store plain arrays",
        images=pixels,
        labels=np.array([1, None]),
    )
    refused(tmp_path, "only foo", foo=pixels)
    refused(tmp_path, "the train split is empty", images=pixels[:0], labels=classes[:0])
    refused(tmp_path, "12 images but 11 labels", images=pixels, labels=classes[1:])
    refused(tmp_path, "but 11 clean_labels", images=pixels, labels=classes, clean_labels=classes[1:])
    refused(tmp_path, r"0..255; scale them to 0\.\.1", images=pixels.astype(np.float32), labels=classes)
    refused(tmp_path, "image 0 has a NaN or infinite pixel", images=np.full((12, 8, 8), np.nan), labels=classes)
    refused(tmp_path, "int64; must be uint8", images=pixels.astype(np.int64), labels=classes)
    refused(tmp_path, r"\[12, 192\]; must be", images=pixels.reshape(12, -1), labels=classes)
    refused(
        tmp_path,
        r"\[12, 8, 8, 4\]: 4 channels \(colour and alpha, or CMYK\); store 3",
        images=np.zeros((12, 8, 8, 4), np.uint8),
        labels=classes,
    )
    refused(tmp_path, "labels of float64", images=pixels, labels=classes / 2)
    refused(tmp_path, r"labels of int64 \[12, 3\]", images=pixels, labels=np.eye(3, dtype=int)[classes])
    refused(tmp_path, "label -1", images=pixels, labels=classes - 1)
    refused(
        tmp_path,
        r"label 3; must be in 0\.\.2",
        images=pixels,
        labels=classes + 1,
        class_names=np.array(["a", "b", "c"]),
    )
    refused(
        tmp_path,
        "label 'd' is not one of the 2 classes",
        images=pixels[:1],
        labels=np.array(["d"]),
        class_names=np.array(["a", "b"]),
    )


@pytest.mark.parametrize("keep", [0, 30, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_truncated_file_is_refused(tmp_path, pixels, classes, kind, keep):
    path = tmp_path / f"set.{kind}"
    if kind == "npz":
        np.savez(path, images=pixels, labels=classes)
    else:
        save_file({"images": torch.from_numpy(pixels), "labels": torch.from_numpy(classes)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(UserError, match=f"not a valid .{kind} file"):
        open_data(path)


def test_an_npz_damaged_in_the_middle_is_refused(tmp_path, pixels, classes):
    np.savez_compressed(tmp_path / "set.npz", images=pixels, labels=classes)
    data = bytearray((tmp_path / "set.npz").read_bytes())
    data[300:1500] = bytes(1200)
    (tmp_path / "set.npz").write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"images: not a valid array .*copy it again"):
        open_data(tmp_path / "set.npz")


def test_safetensors_errors(tmp_path, pixels):
    images = torch.from_numpy(pixels)
    save_file({"images": images, "labels": torch.zeros(12, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="labels of float32"):
        open_data(tmp_path / "a.safetensors")
    save_file(
        {"images": images, "labels": torch.zeros(12, dtype=torch.int64)},
        tmp_path / "b.safetensors",
        {"class_names": "x"},
    )
    with pytest.raises(UserError, match="store class_names as a JSON list"):
        open_data(tmp_path / "b.safetensors")


def idx(array):
    return (
        bytes((0, 0, 8, array.ndim))
        + b"".join(n.to_bytes(4, "big") for n in array.shape)
        + array.astype(np.uint8).tobytes()
    )


@pytest.mark.parametrize(("dot", "packed"), [("-", True), (".", True), ("-", False), (".", False)])
def test_idx(tmp_path, pixels, classes, dot, packed):
    grey = pixels[..., 0]
    for prefix, rows in (("train", slice(None)), ("t10k", slice(2, 5))):
        for what, array in (("images", grey[rows]), ("labels", classes[rows])):
            data = idx(array)
            name = f"{prefix}-{what}{dot}idx{array.ndim}-ubyte" + (".gz" if packed else "")
            (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
    train, test = open_data(tmp_path)
    assert test is not None
    assert train.source["format"] == "idx"
    assert torch.equal(train.images, torch.from_numpy(grey[:, None].copy()))
    assert test.labels.tolist() == classes[2:5].tolist()
    assert torch.equal(test.images, train.images[2:5])


@pytest.mark.parametrize("in_parts", [False, True])
def test_idx_errors(tmp_path, pixels, classes, monkeypatch, in_parts):
    if in_parts:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(mapped, "is_large", lambda shape: True)
        monkeypatch.setattr("tadperf.data.readers.idx.CHUNK", 5)
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"

    def refuse(words, data=idx(pixels[..., 0]), cut=None):  # noqa: B008
        images.write_bytes(gzip.compress(data)[:cut])
        with pytest.raises(UserError, match=words) as caught:
            open_data(tmp_path)
        assert caught.value.value == images

    refuse("the matching file of images or labels is missing")
    labels.write_bytes(gzip.compress(idx(classes)))
    whole = idx(pixels[..., 0])
    for cut in (-5, 100, 12):
        refuse("not a valid gzip file", cut=cut)
    refuse("700 bytes; the header declares 12 x 8 x 8", whole[: 16 + 700])
    refuse("too many bytes; the header declares 12 x 8 x 8", whole + b"0")
    refuse("does not start as an idx3", whole[:10])
    refuse("does not start as an idx3", idx(classes))
    refuse("11 images but 12 labels", idx(pixels[1:, ..., 0]))
    assert images.exists()
