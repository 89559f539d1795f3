"""Trajectory matching: the objective, its exact gradient and the loop.

In other people's matching code, `adjoint` replaces the unrolled inner loop and its backward pass:

    steps = [Step(rows, repeatable(augment)) for rows in torch.randperm(len(images)).split(batch)]
    found = adjoint(net, expert[start], expert[start + 2], images, labels, lr, steps)
    images.grad, lr.grad = found.images, found.lr
"""

from __future__ import annotations

from tadperf.matching.gradient import Gradient, Step
from tadperf.matching.interface import adjoint, repeatable
from tadperf.nets.flat import FlatNet

__all__ = ["FlatNet", "Gradient", "Step", "adjoint", "repeatable"]
