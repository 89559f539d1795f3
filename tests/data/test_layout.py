from __future__ import annotations

import pytest

from tadperf.data.layout import choose_splits, split_of


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002", "train"),
        ("cifar10-test", "test"),
        ("Validation", "validation"),
        ("val_0", "val"),
        ("valid", "valid"),
        ("training", None),
        ("contest", None),
        ("0000", None),
    ],
)
def test_split_of(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        (("train", "val", "test"), {"train": "train", "test": "test"}),
        (("val", "validation"), {"test": "validation"}),
        (("train",), {"train": "train"}),
        ((), {}),
    ],
)
def test_choose_splits(found, chosen):
    assert choose_splits(dict.fromkeys(found)) == chosen
