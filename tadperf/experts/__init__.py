"""Expert trajectories: training them, keeping them."""

from __future__ import annotations

from tadperf.experts import store
from tadperf.experts.train import train_expert, train_experts

__all__ = ["store", "train_expert", "train_experts"]
