"""Compares tadperf.kernels.reliability with plain PyTorch, torch.compile and scipy: `tadperf bench reliability`.

N samples with D features around C anchors; the condition of the covariance is about 100.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tadperf.bench.operators.engine import Bench, Provider, Size, plain
from tadperf.kernels import Reliability, reliability, reliability_reference


def inputs(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, width, classes = size
    generator = torch.Generator(device).manual_seed(seed)
    anchors = torch.randn(classes, width, device=device, generator=generator)
    features = torch.randn(rows, width, device=device, generator=generator)
    features += anchors[torch.randint(classes, (rows,), device=device, generator=generator)]
    spread = torch.randn(width, width, device=device, generator=generator, dtype=torch.float64)
    covariance = spread @ spread.T / width + 0.05 * torch.eye(width, device=device, dtype=torch.float64)
    cholesky = torch.linalg.cholesky(covariance).float().contiguous()
    return features.to(dtype), anchors.to(dtype), cholesky.to(dtype)


def moved(size: Size, dtype: torch.dtype) -> int:
    """Bytes: reads features, anchors and factor, writes four floats and four int64."""
    rows, width, classes = size
    return (rows + classes + width) * width * dtype.itemsize + rows * (4 * 4 + 4 * 8)


def flops(size: Size) -> int:
    """Operations of the whitening, whose matrix is triangular, and of the two products with the anchors."""
    rows, width, classes = size
    return rows * width * (width + 4 * classes)


def eager(features: Tensor, anchors: Tensor, cholesky: Tensor) -> Reliability:
    """The usual PyTorch code: whiten, cdist, cosines, topk."""
    features, anchors, cholesky = features.float(), anchors.float(), cholesky.float()
    whitened = torch.linalg.solve_triangular(cholesky, features.T, upper=False).T
    centres = torch.linalg.solve_triangular(cholesky, anchors.T, upper=False).T
    distance, near = torch.cdist(whitened, centres).topk(2, largest=False)
    return _results(distance, near, _cosines(features, anchors))


def expanded(features: Tensor, anchors: Tensor, cholesky: Tensor) -> Reliability:
    """Computes the same by one product with the inverse of the factor, and by the expanded square of the difference."""
    features, anchors, cholesky = features.float(), anchors.float(), cholesky.float()
    eye = torch.eye(len(cholesky), device=cholesky.device)
    inverse = torch.linalg.solve_triangular(cholesky, eye, upper=False)
    centre = anchors.mean(0)
    whitened, centres = (features - centre) @ inverse.T, (anchors - centre) @ inverse.T
    squares = (whitened * whitened).sum(-1, keepdim=True) + (centres * centres).sum(-1)
    distance, near = torch.addmm(squares, whitened, centres.T, alpha=-2).topk(2, largest=False)
    return _results(distance.clamp(min=0).sqrt(), near, _cosines(features, anchors))


def _cosines(features: Tensor, anchors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(anchors).T


def _results(distance: Tensor, near: Tensor, cosines: Tensor) -> Reliability:
    cosine, similar = cosines.topk(2)
    pairs = (near, distance), (similar, cosine)
    return Reliability(*(part[:, k] for pair in pairs for k in range(2) for part in pair))


def scipy() -> Callable[[Tensor, Tensor, Tensor], Reliability]:
    """SciPy's triangular solve, and its cdist for both distances."""
    from scipy.linalg import solve_triangular
    from scipy.spatial.distance import cdist

    def tables(features: Tensor, anchors: Tensor, cholesky: Tensor) -> Reliability:
        z, mu, factor = (x.float().numpy() for x in (features, anchors, cholesky))
        whitened, centres = (solve_triangular(factor, x.T, lower=True).T for x in (z, mu))
        distance, near = torch.from_numpy(cdist(whitened, centres)).topk(2, largest=False)
        return _results(distance, near, 1 - torch.from_numpy(cdist(z, mu, "cosine")))

    return tables


BENCH = Bench(
    name="reliability",
    axes=("N", "D", "C"),
    sizes={
        "cpu": ((10_000, 512, 10), (50_000, 2048, 100)),
        "cuda": ((50_000, 512, 10), (50_000, 2048, 100), (1_280_000, 512, 1000)),
    },
    inputs=inputs,
    moved=moved,
    reference=reliability_reference,
    providers={
        "tadperf": Provider("tadperf", lambda: reliability),
        **plain({"": eager, "expanded": expanded}),
        "scipy": Provider("peer", scipy, package="scipy", limit=1e9),
    },
    # cdist and the expanded square lose half of the digits of a difference. Similarities lie in -1..1.
    tolerance={
        **dict.fromkeys(("distance", "second_distance"), (1e-3, 1e-3)),
        **dict.fromkeys(("similarity", "second_similarity"), (1e-4, 1e-5)),
    },
)
