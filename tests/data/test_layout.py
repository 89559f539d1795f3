"""Converts the labels of every split to class names and class numbers."""

from __future__ import annotations

import numpy as np
import pytest

from tadperf.data.layout import index_labels
from tadperf.errors import UserError


def test_text_is_sorted_over_all_splits_and_compared_in_nfc():
    names, labels = index_labels(
        {"train": np.array(["caf\u00e9", "bar"]), "test": np.array(["cafe\u0301"])}, None, "set"
    )
    assert names == ("bar", "caf\u00e9")
    assert labels["train"].tolist() == [1, 0]
    assert labels["test"].tolist() == [1]


@pytest.mark.parametrize("high", [3, 10**6, 2**62])
def test_a_class_number_above_the_number_of_samples_is_refused_before_names_are_made(high):
    with pytest.raises(UserError, match=f"label {high} in a set of 3 samples"):
        index_labels({"train": np.array([0, 1, high])}, None, "set")
