"""Expert trajectories: training them, keeping them."""

from __future__ import annotations

__all__ = ["store", "train_expert", "train_experts"]
