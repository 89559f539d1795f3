"""Labelled images: opening them, replacing or spoiling their labels, normalising them."""

from __future__ import annotations

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
