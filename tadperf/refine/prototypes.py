"""Prototypes: what a diffusion model starts the images of a class from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.config import RefineConfig
from tadperf.data.pick import distinct
from tadperf.errors import UserError

NEIGHBOURS = 20  # of the local outlier factor (scikit-learn's default)


def prototypes(
    pixels: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
    labels: Tensor,
    class_names: tuple[str, ...],
    ipc: int,
    config: RefineConfig,
    seed: int,
) -> Tensor:
    """`ipc` k-means prototypes of every class in the diffusion model's space, float32 [C * ipc, ...], class by class.

    pixels: uint8 images by index int64 [B]; encode: images to the model's space; labels: int64 [N], -1 for samples that
    are not trusted. "latents" clusters encoded images and takes the centres; "pixels" clusters pixels and takes the
    samples nearest to the centres, encoded (tadperf). One class at a time is held. Raises UserError where a class has
    fewer trusted samples than `ipc`.
    """
    made = []
    for label, name in enumerate(class_names):
        own = (labels == label).nonzero()[:, 0]
        if len(own) < ipc:
            held = f"class {name!r} has {len(own) or 'no'} trusted sample{'s' * (len(own) != 1)}"
            raise UserError("--ipc", ipc, f"{held}; take fewer images per class, or loosen what is trusted")
        images, state = pixels(own), seeds.derive(seed, "prototypes", label) % 2**32
        latents = config.prototypes == "latents"
        points = encode(images) if latents else images.float()
        inside = inliers(points.flatten(1).cpu(), config.outliers, ipc)
        points, images = points[inside.to(points.device)], images[inside.to(images.device)]
        centres = k_means(points.flatten(1).cpu(), ipc, state)
        if latents:
            made.append(centres.view(ipc, *points.shape[1:]))
        else:
            made.append(encode(images[distinct(torch.cdist(centres, points.flatten(1).cpu())).to(images.device)]).cpu())
    return torch.cat(made)


def k_means(points: Tensor, count: int, state: int) -> Tensor:
    """Centres float32 [count, D] of points [N, D]. One thread: scikit-learn's sums over threads have no fixed order."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        clusters = KMeans(count, n_init=3, random_state=state)  # pyright: ignore[reportArgumentType]
        fitted = clusters.fit(points.float().numpy())
    return torch.from_numpy(fitted.cluster_centers_).float()


def inliers(points: Tensor, share: float, least: int) -> Tensor:
    """bool [N]: points [N, D] without the `share` of highest local outlier factor (Breunig et al., 2000).

    At least `least` points stay.
    """
    keep = torch.ones(len(points), dtype=torch.bool)
    drop = min(int(share * len(points)), len(points) - least)
    if drop > 0:
        from sklearn.neighbors import LocalOutlierFactor

        factor = LocalOutlierFactor(n_neighbors=min(NEIGHBOURS, len(points) - 1)).fit(points.float().numpy())
        keep[torch.from_numpy(factor.negative_outlier_factor_).argsort(stable=True)[:drop]] = False
    return keep
