"""Data sets of the Hugging Face hub and objects of the library `datasets`. Nothing here uses the network."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tadperf.data.open import open_data
from tadperf.data.readers.hub import hub_name
from tadperf.errors import UserError


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """Returns the library `datasets`, with an empty cache folder and without the network."""
    library = pytest.importorskip("datasets", reason="needs the library datasets (the extra hub)")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    return library


@pytest.fixture
def folder(tmp_path) -> Path:
    """Returns an image folder: image k of class c has the value 10 c + k; the test images begin at k = 5."""
    for split, numbers in (("train", range(3)), ("test", range(5, 7))):
        for c, name in enumerate("ab"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for k in numbers:
                Image.fromarray(np.full((4, 4), 10 * c + k, np.uint8)).save(
                    tmp_path / "set" / split / name / f"{k}.png"
                )
    return tmp_path / "set"


def values(split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf://user/name", "user/name"),
        ("hf://datasets/user/name:config", "user/name:config"),
        (Path("hf://user/name"), "user/name"),
        ("hf://mnist", "mnist"),
        ("user/name", "user/name"),
        ("user/name:config", "user/name:config"),
        ("/user/name", None),
        ("name", None),
        ("a/b/c", None),
        ("here/name", None),  # a wrong path into a local folder
        ("../name", None),
    ],
)
def test_names_of_the_hub(tmp_path, monkeypatch, text, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub_name(text) == name


def test_without_the_library_the_message_names_the_extra(monkeypatch):
    def refuse(name, *details):
        if name == "datasets":
            raise ImportError(name)
        return importing(name, *details)

    importing = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"user/name: no such file or folder; to load .*pip install 'tadperf\[hub\]'"):
        open_data("user/name")


def test_without_the_network_the_message_says_so(datasets):
    with pytest.raises(UserError, match=r"hf://nobody/nothing: cannot be loaded .*check the name and the network"):
        open_data("hf://nobody/nothing")


def test_several_configs(datasets, monkeypatch):
    def load(name, config):
        assert (name, config) == ("user/name", None)
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['x', 'y']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"several configs; name one as hf://user/name:CONFIG .*'x', 'y'"):
        open_data("hf://user/name")


def test_a_local_folder_and_a_config_go_through_load_dataset(datasets, folder, monkeypatch):
    train, test = open_data(folder, format="hub")
    assert (train.class_names, train.labels.tolist()) == (("a", "b"), [0, 0, 0, 1, 1, 1])
    assert values(train) == [0, 1, 2, 10, 11, 12]
    assert test is not None
    assert values(test) == [5, 6, 15, 16]
    loaded = datasets.load_dataset(str(folder))
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: calls.append(names) or loaded)
    assert values(open_data("user/name:small", image_root=str(folder)).train) == values(train)
    assert calls == [("user/name", "small")]
    with pytest.raises(UserError, match="lies outside of"):  # a row must not name any file of the user
        open_data("user/name:small")


def test_a_parquet_file_and_a_folder_that_the_library_writes(datasets, folder, tmp_path):
    loaded = datasets.load_dataset(str(folder))
    loaded["train"].to_parquet(tmp_path / "tables" / "train.parquet")
    loaded.save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=rf"allow it with image_root={folder}/train/a"):
        open_data(tmp_path / "tables")
    assert values(open_data(tmp_path / "tables", image_root=str(folder)).train) == [0, 1, 2, 10, 11, 12]
    train, test = open_data(tmp_path / "saved")
    assert train.class_names == ("a", "b")
    assert values(train) == [0, 1, 2, 10, 11, 12]
    assert test is not None
    assert values(test) == [5, 6, 15, 16]
    loaded["train"].select([4, 0]).save_to_disk(tmp_path / "part")
    assert values(open_data(tmp_path / "part").train) == [11, 0]
    assert torch.equal(open_data(tmp_path / "part").train.labels, torch.tensor([1, 0]))
