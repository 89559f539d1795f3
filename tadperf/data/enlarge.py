"""Multi-formation: synthetic images that are stored small, and enlarged before a network sees them.

Published in IDC (Kim et al., ICML 2022, "Dataset Condensation via Efficient Synthetic-Data Parameterization"): the
memory of one image holds factor^2 images, each with 1 / factor of the side. Networks see them enlarged to the full
side by bilinear interpolation. There the small images are tiles of one image, here each is an image of its own.

    E(x) = U x U^T     U: [side, small], the two weights of each row are those of bilinear interpolation
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def small_side(side: int, factor: int) -> int:
    """Returns the side of the small images, in pixels. It is rounded up."""
    return -(-side // factor)


def shrink(images: Tensor, factor: int) -> Tensor:
    """Returns images [N, C, S, S] with 1 / factor of their side, as means of their pixels."""
    return images if factor == 1 else F.adaptive_avg_pool2d(images, small_side(images.shape[-1], factor))


def enlarge(images: Tensor, side: int) -> Tensor:
    """Returns square images [N, C, s, s] enlarged to [N, C, side, side] by bilinear interpolation."""
    if images.shape[-1] == side:
        return images
    weights = interpolation(images.shape[-1], side, images.device)
    # In float64, because TF32 would round pixels to 10 bits.
    return (weights @ images.double() @ weights.T).to(images.dtype)


def enlarge_adjoint(gradient: Tensor, small: int) -> Tensor:
    """Returns the gradient of the small images [N, C, small, small] from that of the enlarged ones (tadperf).

    A product instead of PyTorch's backward pass, which adds in no fixed order on CUDA.
    """
    if gradient.shape[-1] == small:
        return gradient
    weights = interpolation(small, gradient.shape[-1], gradient.device)
    return (weights.T @ gradient.double() @ weights).to(gradient.dtype)


@lru_cache(maxsize=16)
def interpolation(small: int, side: int, device: torch.device) -> Tensor:
    """Returns U, the weights float64 [side, small] of bilinear interpolation along one axis."""
    unit = torch.eye(small, dtype=torch.float64)
    return F.interpolate(unit[None], size=side, mode="linear", align_corners=False)[0].T.contiguous().to(device)
