"""The inputs that every training stage needs, as one frozen object."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tadperf.config import NetConfig
from tadperf.data.images import Images, first_image
from tadperf.nets.architectures import Shape


@dataclass(frozen=True)
class Problem:
    """Images with labels, and the network that learns them (N samples, C classes).

    images: normalised, float32 [N, channels, H, W], looked up by index. labels: int64 [N], or logits float32 [N, C].
    augment: the strategy of `data.augment`. seed: all draws derive from it. weights: float32 [N]; None means 1 for all.
    """

    images: Images
    labels: Tensor
    class_names: tuple[str, ...]
    net: NetConfig
    augment: str
    seed: int
    device: torch.device
    weights: Tensor | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property  # read once: it looks up an image
    def shape(self) -> Shape:
        """Channels, height and width of one image."""
        channels, height, width = first_image(self.images).shape[1:]
        return channels, height, width
