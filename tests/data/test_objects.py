"""Python objects as data: tadperf's Dataset, the library `datasets`, and complete jobs from Python."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import tadperf
from tadperf.config.merge import merge
from tadperf.data.dataset import Dataset
from tadperf.data.open import open_data
from tadperf.errors import UserError

TINY = {
    "match.ipc": 1,
    "net.width": 8,
    "net.depth": 1,
    "experts.count": 2,
    "match.iterations": 4,
    "match.check_every": 2,
    "match.steps": 2,
    "match.max_start": 1,
    "match.expert_epochs": 1,
    "evaluate.epochs": 3,
    "evaluate.repeats": 1,
    "evaluate.full_epochs": 1,
    "evaluate.full_repeats": 1,
    "trust.rounds": 1,
    "trust.proxies": 2,
    "trust.epochs": 2,
    "device": "cpu",
}


class Items:
    """Images of two classes, dark and bright."""

    classes = ("dark", "bright")

    def __init__(self, count: int) -> None:
        noise = np.random.default_rng(count).integers(0, 60, (count, 8, 8), np.uint8)
        self.images = noise + (np.arange(count) % 2 * 150).astype(np.uint8)[:, None, None]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> tuple[np.ndarray, int]:
        return self.images[k], k % 2


def test_a_dataset_of_tadperf_is_opened_as_it_is():
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 2, 2)
    split = Dataset(images, torch.tensor([0, 1, 1, 0]), ("a", "b"), "mine")
    train, test = open_data((split, split))
    assert test is not None
    assert train.fingerprint == test.fingerprint == split.fingerprint
    other = Dataset(split.images, split.labels, ("b", "a"), "other")
    with pytest.raises(UserError, match="other class names"):
        open_data((split, other))


def test_objects_of_the_library_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the library datasets (the extra hub)")
    from PIL import Image

    features = datasets.Features({"img": datasets.Image(), "y": datasets.ClassLabel(names=["a", "b"])})
    rows = {"img": [Image.fromarray(np.full((4, 4), k, np.uint8)) for k in range(6)], "y": [0, 1] * 3}
    whole = datasets.Dataset.from_dict(rows, features=features)
    train, test = open_data(whole)
    assert test is None
    assert (train.class_names, train.labels.tolist()) == (("a", "b"), [0, 1] * 3)
    assert train.images[:, 0, 0, 0].tolist() == list(range(6))
    parts = datasets.DatasetDict({"train": whole.select([5, 0, 3]), "validation": whole.select([1, 2])})
    train, test = open_data(parts)
    assert test is not None
    assert train.images[:, 0, 0, 0].tolist() == [5, 0, 3]
    assert test.labels.tolist() == [1, 0]
    with pytest.raises(UserError, match="IterableDataset; load it without streaming"):
        open_data(whole.to_iterable_dataset())


def test_distill_and_audit_from_python(tmp_path):
    config = merge("digits", options=TINY)
    assert config.data.noise != "none"
    distilled = tadperf.distill(config, tmp_path / "run", data=(Items(60), Items(20)))
    assert distilled.class_names == ("dark", "bright")
    assert distilled.data["source"]["path"] == "python:Items"
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (stored["data"]["path"], stored["data"]["noise"]) == ("python:Items", "none")
    again = tadperf.distill(config, tmp_path / "run", resume=True, data=(Items(60), Items(20)))
    assert torch.equal(again.images, distilled.images)
    with pytest.raises(UserError, match="does not name a path of its data; give a test set"):
        distilled.test_split()
    test = open_data((Items(4), Items(20))).test
    assert test is not None
    assert 0 <= distilled.accuracy(distilled.train(), test) <= 1
    state = tadperf.audit(Items(60), config)
    assert (len(state), state.class_names) == (60, ("dark", "bright"))
    assert len(tadperf.audit("digits", config)) == 1400


@pytest.mark.filterwarnings("ignore::tadperf.errors.DataWarning")
def test_a_test_split_that_was_made_is_found_by_the_path_of_the_data(tmp_path):
    """The lines that a run prints measure a network on the path of the data."""
    items = Items(60)
    np.savez(tmp_path / "set.npz", images=items.images, labels=np.arange(60) % 2)
    distilled = tadperf.distill(merge("quick", options=TINY), tmp_path / "run", data=tmp_path / "set.npz")
    assert distilled.data["source"]["test_share"] == 0.2
    test = distilled.test_split()
    assert len(test) == 12
    assert distilled.test_split(tmp_path / "set.npz").fingerprint == test.fingerprint
    assert 0 <= distilled.accuracy(distilled.train(), tmp_path / "set.npz") <= 1
    np.savez(tmp_path / "other.npz", images=items.images, labels=np.arange(60) % 2)
    with pytest.raises(UserError, match="has no test split"):
        distilled.test_split(tmp_path / "other.npz")
