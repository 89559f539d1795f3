"""Labels with known errors, and a simulated model."""

from __future__ import annotations

import numpy as np


def simulated_labels(
    count: int = 600, classes: int = 4, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns labels with 20 % errors, a model's probabilities, features, and the true labels."""
    rng = np.random.default_rng(seed)
    clean = np.arange(count) % classes
    centres = rng.normal(size=(classes, 8)) * 2
    z = centres[clean] + rng.normal(size=(count, 8))
    logits = -((z[:, None] - centres[None]) ** 2).sum(2) / 2
    p = np.exp(logits - logits.max(1, keepdims=True))
    wrong = rng.random(count) < 0.2
    labels = np.where(wrong, (clean + rng.integers(1, classes, count)) % classes, clean)
    return labels, p / p.sum(1, keepdims=True), z, clean
