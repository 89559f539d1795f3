"""Coresets: real images that a distilled set must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.data.images import Images
from tadperf.data.pick import subsample


def pick_k_centres(images: Images, labels: Tensor, ipc: int, seed: int) -> Tensor:
    """Returns the indices of `ipc` k-centre samples of each class, class by class (Gonzalez, 1985; Sener and Savarese,
    2018).

    The first sample of a class is the one nearest to the mean of the class, so the result needs no draw. Each further
    one is the farthest from those before. Distances are between normalised pixels, as those of `pick_central`.
    labels: int64 [N]; -1 for samples that may not be chosen. seed: draws the candidates of a class that is too large.
    """
    picked = []
    for label in range(int(labels.max()) + 1):
        rows = subsample((labels == label).nonzero()[:, 0], images, seeds.derive(seed, "centres", label))
        points = images[rows].flatten(1)
        picked.append(rows[k_centres(points, ipc).to(rows.device)])
    return torch.cat(picked)


def k_centres(points: Tensor, count: int) -> Tensor:
    """Returns the indices of `count` points [N, D] by greedy k-centre, int64 [min(count, N)]."""
    nearest = (points - points.mean(0)).norm(dim=1)
    chosen = [int(nearest.argmin())]
    nearest = (points - points[chosen[0]]).norm(dim=1)
    nearest[chosen[0]] = -1  # a chosen point is never chosen again, also if all points are equal
    while len(chosen) < min(count, len(points)):
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).norm(dim=1))
        nearest[chosen] = -1
    return torch.tensor(chosen)
