"""Recognises the split (train, test or validation) in the name of a file or folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Words for each split. Each may also end in one of FILLERS: "trainset", "testdata".
WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation", "holdout", "heldout"),
    "validation": ("validation", "valid", "val", "dev", "development"),
}
# Words that may stand next to a split word without changing its meaning: "seg_train", "train_images".
FILLERS = ("set", "data", "dataset", "split", "images", "image", "imgs", "img", "pics", "photos", "folder", "seg")
TEST_ORDER = ("test", "validation")  # the first of these in a set is its test split


def split_of_folder(name: str) -> str | None:
    """Returns the split that a folder's name means, or None. Every word of the name must be known: "Train Data".

    A class folder may contain a split word ("train station"), so one unknown word means None.
    """
    words = _words(name)
    splits = {split for word in words if (split := _split_of_word(word))}
    known = all(_split_of_word(word) or word in FILLERS or word.isdigit() for word in words)
    return splits.pop() if len(splits) == 1 and known else None


def split_of_file(name: str) -> str | None:
    """Returns the split that one word of a file's name means, or None: "train-00000-of-00002", "cifar10-test"."""
    splits = {split for word in _words(name) if (split := _split_of_word(word))}
    return splits.pop() if len(splits) == 1 else None


def choose_splits(names: Iterable[str]) -> dict[str, str]:
    """Returns the names of the splits to use as "train" and as "test"."""
    splits = set(names)
    test = next((name for name in TEST_ORDER if name in splits), None)
    return ({"train": "train"} if "train" in splits else {}) | ({"test": test} if test else {})


def look_like_splits(names: Iterable[str]) -> list[str]:
    """Returns the names that contain a split word, if they contain words of at least two splits; else nothing."""
    suspects = {name: split for name in names if (split := split_of_file(name))}
    return sorted(suspects) if len(set(suspects.values())) > 1 else []


def _words(name: str) -> list[str]:
    """Splits "TrainSet_01" into ["train", "set", "01"]."""
    separated = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    joined = re.sub(r"\b(hold|held)[\W_]+out\b", r"\1out", separated.lower())
    return re.findall(r"[^\W\d_]+|\d+", joined)


def _split_of_word(word: str) -> str | None:
    """Returns the split of one word, such as "training", "trainset" or "testdata"."""
    return _SPLIT_OF.get(word)


def _with_endings(words: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    endings = ("", *FILLERS)
    return {word + ending: split for split, stems in words.items() for word in stems for ending in endings}


_SPLIT_OF = _with_endings(WORDS)
