"""Small synthetic sets for the tests of several readers."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def pixels() -> np.ndarray:
    """Returns twelve colour images, uint8 [12, 8, 8, 3]."""
    return np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def classes() -> np.ndarray:
    """Returns their labels: four images in each of three classes."""
    return np.arange(12) % 3


@pytest.fixture
def png():
    """Returns a function that encodes uint8 [H, W] or [H, W, 3] as PNG."""

    def encode(array: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "png")
        return file.getvalue()

    return encode
