"""A network as a pure function of one flat parameter vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FlatNet:
    """A network as a pure function of one flat parameter vector: `flat(theta, x) -> logits`.

    theta is [P]; trajectories, distances and updates then are single vector operations (tadperf).
    """

    def __init__(self, module: nn.Module):
        assert not list(module.buffers()), "running statistics are not parameters: use a norm without them"
        self.module = module
        self.names, parameters = zip(*module.named_parameters(), strict=True)
        self.shapes = [p.shape for p in parameters]
        self.sizes = [p.numel() for p in parameters]
        self.num_parameters = sum(self.sizes)

    def flatten(self) -> Tensor:
        """The module's own parameters as a new vector [P]."""
        return torch.cat([p.detach().flatten() for p in self.module.parameters()])

    def views(self, theta: Tensor) -> dict[str, Tensor]:
        """Each parameter as a named view of `theta` [P]."""
        parts = zip(self.names, theta.split(self.sizes), self.shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in parts}

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.module, self.views(theta), (x,))
