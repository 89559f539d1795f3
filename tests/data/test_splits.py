"""Splits recognised in the names of files and folders."""

from __future__ import annotations

import pytest

from tadperf.data.splits import choose_splits, look_like_splits, split_of_file, split_of_folder
from tadperf.data.text import display_name, nfc


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002", "train"),
        ("cifar10-test", "test"),
        ("Validation", "validation"),
        ("val_0", "validation"),
        ("training", "train"),
        ("mnist_training", "train"),
        ("fashion-testing", "test"),
        ("traindata", "train"),
        ("contest", None),
        ("trainer", None),
        ("0000", None),
        ("train_test_split", None),
    ],
)
def test_one_word_of_a_file_name_means_the_split(name, split):
    assert split_of_file(name) == split


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((name, "train") for name in ("train", "Training", "training_set", "seg_train", "train_images", "Train Data")),
        *((name, "train") for name in ("TrainSet", "trainset", "TRAIN", "train2")),
        *((name, "test") for name in ("test", "Testing", "test_set", "eval", "holdout", "hold-out", "held_out")),
        *((name, "validation") for name in ("val", "valid", "validation", "dev", "ValSet", "validation_images")),
        *((name, None) for name in ("train station", "steam_train", "valley", "tester", "disc", "", "0", "images")),
    ],
)
def test_every_word_of_a_folder_name_must_be_known(name, split):
    assert split_of_folder(name) == split


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("train", "validation", "test"), {"train": "train", "test": "test"}),
        (("validation",), {"test": "validation"}),
        (("train",), {"train": "train"}),
        ((), {}),
    ],
)
def test_choose_splits(names, chosen):
    assert choose_splits(names) == chosen


def test_two_names_with_split_words_look_like_splits():
    assert look_like_splits(["my_train_v2x", "my_test_v2x", "cat"]) == ["my_test_v2x", "my_train_v2x"]
    assert look_like_splits(["steam train", "bullet train", "car"]) == []


def test_nfc_joins_a_letter_and_its_accent():
    assert nfc("cafe\u0301") == "caf\u00e9"


def test_a_name_that_is_not_utf8_becomes_text():
    assert display_name(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf\\xe9"
    assert display_name("cafe\u0301") == "caf\u00e9"
