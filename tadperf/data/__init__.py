"""Labelled images: opens them, replaces or corrupts their labels, normalises them."""

from __future__ import annotations

from tadperf.data.dataset import Dataset
from tadperf.data.images import LazyImages, normalise_images
from tadperf.data.labels import replace_labels
from tadperf.data.noise import add_noise, parse_noise
from tadperf.data.normalise import Normaliser, fit_normaliser
from tadperf.data.open import Splits, open_data

__all__ = [
    "Dataset",
    "LazyImages",
    "Normaliser",
    "Splits",
    "add_noise",
    "fit_normaliser",
    "normalise_images",
    "open_data",
    "parse_noise",
    "replace_labels",
]
