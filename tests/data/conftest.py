"""Small made-up sets that several readers are tested on."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def pixels() -> np.ndarray:
    """Twelve colour images, uint8 [12, 8, 8, 3]."""
    return np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def classes() -> np.ndarray:
    """Their labels: three classes of four."""
    return np.arange(12) % 3


@pytest.fixture
def png():
    """Encodes uint8 [H, W] or [H, W, 3] without loss."""

    def encode(array: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "png")
        return file.getvalue()

    return encode
