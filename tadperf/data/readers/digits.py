"""Reads scikit-learn's digits, the built-in data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tadperf.data.layout import Content, Layout, ReadOptions

DIGITS_TRAIN = 1400  # of scikit-learn's 1797 digits; the other 397 are the test split


def read_digits(path: Path, options: ReadOptions) -> Layout:
    """Returns scikit-learn's digits: 1400 train and 397 test images of 8 x 8, with values 0..16 scaled to 0..255.

    The split is stratified by class and fixed: it does not depend on the user's seed.
    """
    from sklearn.datasets import load_digits

    values, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8))
    labels = torch.from_numpy(classes.astype(np.int64))
    order = np.random.RandomState(0).permutation(len(classes))  # NumPy never changes the values of its legacy generator
    share = np.bincount(classes) * DIGITS_TRAIN / len(classes)
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: DIGITS_TRAIN - take.sum()]] += 1  # largest remainders
    train = np.sort(np.concatenate([order[classes[order] == c][: take[c]] for c in range(len(take))]))
    index = {"train": train, "test": np.setdiff1d(np.arange(len(classes)), train)}
    splits = {split: lambda rows=rows: Content(images[rows], labels[rows]) for split, rows in index.items()}
    return Layout(tuple(map(str, range(len(take)))), splits)
