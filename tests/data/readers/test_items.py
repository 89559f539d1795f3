"""Data sets in the style of torchvision: items, class names, file names, random transforms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from tadperf.data.open import open_data
from tadperf.errors import UserError


class Items(Dataset):
    """Six items of two classes: item k has the pixel value k."""

    classes = ("ant", "bee")
    root = ""
    samples: Sequence[tuple[str, int]] = ()

    def __init__(self, make=lambda k: Image.fromarray(np.full((4, 4), k, np.uint8)), label=lambda k: k % 2, count=6):
        self.make, self.label, self.count = make, label, count

    def __len__(self):
        return self.count

    def __getitem__(self, k):
        return self.make(k), self.label(k)


def grey(k: int) -> np.ndarray:
    return np.full((4, 4), k, np.uint8)


@pytest.mark.parametrize(
    "make",
    [
        lambda k: Image.fromarray(grey(k)),
        grey,
        lambda k: torch.from_numpy(grey(k))[None],
        lambda k: torch.from_numpy(grey(k))[None] / 255,
    ],
    ids=["Pillow", "array", "bytes", "ToTensor"],
)
@pytest.mark.parametrize("label", [lambda k: k % 2, lambda k: torch.tensor(k % 2), lambda k: ("ant", "bee")[k % 2]])
def test_images_and_labels_of_several_types(make, label):
    train, test = open_data(Items(make, label))
    assert test is None
    assert train.images[:, 0, 0, 0].tolist() == list(range(6))
    assert train.shape == (1, 4, 4)
    assert (train.class_names, train.labels.tolist()) == (("ant", "bee"), [0, 1] * 3)
    assert (train.source["format"], train.source["path"]) == ("python", "python:Items")


def test_colour_alpha_and_size():
    def make(k):
        return Image.new("RGBA", (8, 6), (k, 2 * k, 3 * k, 255)) if k % 2 else Image.new("L", (4, 4), k)

    train = open_data(Items(make), image_size=4).train
    assert train.shape == (3, 4, 4)
    assert train.images[:, :, 0, 0].tolist() == [[k, 2 * k, 3 * k] if k % 2 else [k] * 3 for k in range(6)]
    large = Items(lambda k: torch.full((3, 8, 8), k, dtype=torch.uint8))
    assert open_data(large, image_size=2).train.shape == (3, 2, 2)


def test_a_pair_and_a_dict_give_both_splits():
    for data in ((Items(), Items(count=2)), {"train": Items(), "val": Items(count=2)}):
        train, test = open_data(data)
        assert test is not None
        assert (len(train), len(test), test.class_names) == (6, 2, ("ant", "bee"))
    assert open_data((Items(), None)).test is None
    with pytest.raises(UserError, match="has no split named train, only a, b"):
        open_data({"a": Items(), "b": Items()})


def test_wrapped_sets_keep_class_names_and_file_names(tmp_path):
    items = Items()
    items.root = str(tmp_path)
    items.samples = [(str(tmp_path / "x" / f"{k}.png"), k % 2) for k in range(6)]
    train = open_data(Subset(items, [5, 2])).train
    assert (train.class_names, train.file_names) == (("ant", "bee"), ("x/5.png", "x/2.png"))
    assert open_data(ConcatDataset([Items(), Items()])).train.class_names == ("ant", "bee")
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 4, 4)
    plain = open_data(TensorDataset(images, torch.tensor([0, 1, 2, 0])))
    assert (plain.train.class_names, plain.train.file_names) == (("0", "1", "2"), None)


def test_random_transforms_are_refused():
    rng = np.random.default_rng(0)

    def flip(k):
        image = np.arange(16, dtype=np.uint8).reshape(4, 4) + k
        return image[:, ::-1].copy() if rng.random() < 0.5 else image

    with pytest.raises(UserError, match="differs between two reads; pass the data set without random transforms"):
        open_data(Items(flip))
    with pytest.raises(UserError, match="differs between two reads"):
        open_data(Items(label=lambda k: int(rng.integers(0, 1000))))


def fail(k):
    raise FileNotFoundError(f"{k}.png is gone")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Items(lambda k: torch.full((3, 4, 4), -1.0)), "values outside of 0..1; remove transforms.Normalize"),
        (Items(lambda k: torch.full((3, 4, 4), torch.nan)), "values outside of 0..1"),
        (Items(lambda k: torch.zeros(5, 3, 4, 4)), "its image is a Tensor; must be a Pillow image or a tensor"),
        (Items(lambda k: "0.png"), "its image is a str"),
        (Items(lambda k: torch.zeros(4, 4, 4, dtype=torch.uint8)), "4 channels"),
        (Items(lambda k: Image.new("I;16", (4, 4))), "mode I;16; convert it to 8 bits"),
        (Items(lambda k: Image.new("L", (4, 4 + k))), "item 1: images of two sizes, 4 x 4 and 5 x 4"),
        (Items(label=lambda k: k / 2), "its label is a float"),
        (Items(label=lambda k: [1, 0]), "its label is a list"),
        (Items(label=lambda k: 2), "label 2"),
        (Items(label=lambda k: "cat"), "label 'cat' is not one of the 2 classes"),
        (Items(fail), r"item 0: cannot be read \(FileNotFoundError: 0.png is gone\)"),
        (Items(count=0), "holds no item"),
        ([1, 2, 3], "item 0: a int; must be a pair"),
        (iter([]), "a list_iterator; must have len"),
        (3, r"python:int \(train\): a int; must have len"),
    ],
)
def test_wrong_objects_are_refused_in_one_line(data, words):
    with pytest.raises(UserError, match=words) as error:
        open_data(data)
    assert "\n" not in str(error.value)


def test_a_set_too_large_for_memory_is_refused(monkeypatch):
    monkeypatch.setattr("tadperf.data.mapped.is_large", lambda shape: True)
    with pytest.raises(UserError, match="GB in memory; save the images as files or parquet"):
        open_data(Items())


def test_real_torchvision_folders(tmp_path):
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
    for c, name in enumerate(("ant", "bee")):
        (tmp_path / name).mkdir()
        for k in range(3):
            Image.fromarray(grey(10 * c + k)).save(tmp_path / name / f"{k}.png")
    train = open_data(torchvision.datasets.ImageFolder(str(tmp_path))).train
    assert train.class_names == ("ant", "bee")
    assert train.file_names == tuple(f"{name}/{k}.png" for name in ("ant", "bee") for k in range(3))
