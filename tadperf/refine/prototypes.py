"""Prototypes: the points from which a diffusion model generates the images of a class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.config import RefineConfig
from tadperf.data.pick import assign_distinct
from tadperf.errors import UserError

NEIGHBOURS = 20  # of the local outlier factor (scikit-learn's default)


def class_prototypes(
    pixels: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
    labels: Tensor,
    class_names: tuple[str, ...],
    ipc: int,
    config: RefineConfig,
    seed: int,
) -> Tensor:
    """Returns `ipc` k-means prototypes of each class in the diffusion model's space: float32 [C * ipc, ...].

    pixels: returns uint8 images by index int64 [B]. encode: maps images to the model's space. labels: int64 [N], -1 for
    samples that are not trusted. With refine.prototypes = "latents", the prototypes are the centres of clusters of the
    encoded images. With "pixels", they are the encoded samples nearest to the centres of clusters of pixels (tadperf).
    Holds the images of one class at a time. Raises UserError if a class has fewer than `ipc` trusted samples.
    """
    prototypes = []
    for label, name in enumerate(class_names):
        members = (labels == label).nonzero()[:, 0]
        if len(members) < ipc:
            size = f"class {name!r} has {len(members) or 'no'} trusted sample{'s' * (len(members) != 1)}"
            raise UserError("--ipc", ipc, f"{size}; use fewer images per class, or trust more samples")
        images, state = pixels(members), seeds.derive(seed, "prototypes", label) % 2**32
        latents = config.prototypes == "latents"
        points = encode(images) if latents else images.float()
        kept = inliers(points.flatten(1).cpu(), config.outliers, ipc)
        points, images = points[kept.to(points.device)], images[kept.to(images.device)]
        centres = k_means(points.flatten(1).cpu(), ipc, state)
        if latents:
            prototypes.append(centres.view(ipc, *points.shape[1:]))
        else:
            nearest = assign_distinct(torch.cdist(centres, points.flatten(1).cpu()))
            prototypes.append(encode(images[nearest.to(images.device)]).cpu())
    return torch.cat(prototypes)


def k_means(points: Tensor, count: int, state: int) -> Tensor:
    """Returns the k-means centres of points [N, D], float32 [count, D].

    Uses one thread: scikit-learn sums over threads in no fixed order.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        clusters = KMeans(count, n_init=3, random_state=state)  # pyright: ignore[reportArgumentType]
        fitted = clusters.fit(points.float().numpy())
    return torch.from_numpy(fitted.cluster_centers_).float()


def inliers(points: Tensor, share: float, least: int) -> Tensor:
    """Returns which of the points [N, D] to keep, bool [N].

    Drops the `share` of points with the highest local outlier factor (Breunig et al., 2000), but keeps `least`.
    """
    keep = torch.ones(len(points), dtype=torch.bool)
    drop = min(int(share * len(points)), len(points) - least)
    if drop > 0:
        from sklearn.neighbors import LocalOutlierFactor

        factor = LocalOutlierFactor(n_neighbors=min(NEIGHBOURS, len(points) - 1)).fit(points.float().numpy())
        keep[torch.from_numpy(factor.negative_outlier_factor_).argsort(stable=True)[:drop]] = False
    return keep
