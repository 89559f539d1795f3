"""Unusual data sets, as users have them: each is read correctly, or refused with the reason."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest

from tadperf.data.open import open_data
from tadperf.errors import UserError

MODULE = runpy.run_path(str(Path(__file__).parent / "make.py"))
CORPUS = MODULE["CORPUS"]


@pytest.mark.parametrize("title", CORPUS)
def test_the_set_is_read_correctly_or_refused(title, tmp_path):
    odd = CORPUS[title]
    path = odd.write(tmp_path)
    options = dict(odd.options)
    if "labels" in options:
        options["labels"] = str(path / options["labels"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if odd.refused:
            with pytest.raises(UserError) as error:
                open_data(path, **options)
            assert odd.refused in str(error.value)
            return
        train, test = open_data(path, image_column=options.get("image_column"), labels=options.get("labels"))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == bool(odd.warns), messages
    assert all(odd.warns in message for message in messages)
    assert train.class_names == odd.names
    assert train.images[:, 0, 0, 0].tolist() == list(odd.train)
    assert (None if test is None else test.images[:, 0, 0, 0].tolist()) == (
        None if odd.test is None else list(odd.test)
    )
    expected = [label for label in range(3) for _ in range(len(train) // 3)]
    assert train.labels.tolist() == (expected if odd.labels is None else list(odd.labels))
