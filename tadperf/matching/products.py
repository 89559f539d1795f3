"""What the adjoint wants of one inner step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Products(NamedTuple):
    """h = lambda . g of one step, and its derivatives by the batch, by soft labels, and by theta where it is wanted."""

    h: Tensor  # scalar
    x: Tensor  # [B, C, H, W]
    labels: Tensor | None  # [B, K]
    theta: Tensor | None  # [P]
