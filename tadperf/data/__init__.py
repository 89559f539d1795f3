"""Labelled images: opening them, replacing or spoiling their labels, normalising them."""

from __future__ import annotations

from tadperf.data.dataset import Dataset
from tadperf.data.labels import replace_labels
from tadperf.data.noise import add_noise, parse_noise
from tadperf.data.normalise import Normaliser, fit, prepare
from tadperf.data.sources import Splits, TestOnly, open_data

__all__ = [
    "Dataset",
    "Normaliser",
    "Splits",
    "TestOnly",
    "add_noise",
    "fit",
    "open_data",
    "parse_noise",
    "prepare",
    "replace_labels",
]
