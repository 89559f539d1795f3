"""A network as a pure function of one flat parameter vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tadperf.errors import UserError


class FlatNet:
    """Turns a network into a pure function `net(theta, x) -> logits` of one parameter vector theta [P] (tadperf).

    Trajectories, distances and updates are then single vector operations.
    Raises UserError for a network with buffers, such as the running statistics of batch norm.
    """

    def __init__(self, module: nn.Module):
        if buffer := next(module.named_buffers(), None):
            layer = buffer[0].rpartition(".")[0]
            place = f"{layer} ({type(module.get_submodule(layer)).__name__}) " if layer else ""
            remedy = "has running statistics or other buffers, which are not parameters; use a norm without them"
            raise UserError("network", type(module).__name__, place + remedy)
        self.module = module
        self.names, parameters = zip(*module.named_parameters(), strict=True)
        self.shapes = [p.shape for p in parameters]
        self.sizes = [p.numel() for p in parameters]
        self.num_parameters = sum(self.sizes)
        self.layer_sizes: dict[str, int] = {}  # the parameters of each layer, in their order in theta
        for name, size in zip(self.names, self.sizes, strict=True):
            layer = name.rpartition(".")[0] or name
            self.layer_sizes[layer] = self.layer_sizes.get(layer, 0) + size

    def flatten(self) -> Tensor:
        """Returns a copy of the module's parameters as one vector [P]."""
        return torch.cat([p.detach().flatten() for p in self.module.parameters()])

    def views(self, theta: Tensor) -> dict[str, Tensor]:
        """Returns each parameter by name, as a view of `theta` [P]."""
        parts = zip(self.names, theta.split(self.sizes), self.shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in parts}

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.module, self.views(theta), (x,))
