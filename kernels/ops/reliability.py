"""The two nearest and the two most similar class anchors of every sample, without [N, C] tables.

With z the features of one sample, mu_c the anchor (mean feature) of class c, and L the lower Cholesky factor of the
covariance Sigma, which all classes share:

    distance     |L^-1 (z - mu_c)|          Mahalanobis, not squared: sqrt((z - mu_c)' Sigma^-1 (z - mu_c))
    similarity   z'mu_c / (|z| |mu_c|)      cosine, -1 to 1; 0 if z or mu_c has length 0

`nearest` and `second` have the smallest two distances, `most_similar` and `second_similar` the largest two
similarities. Among equal values the lowest class comes first. A result that does not exist has class -1 and value NaN.
With one anchor there is no second one. A sample with a NaN, an infinity or a squared length that overflows has no
result at all. An anchor with a NaN or an infinity (a class without samples) is never chosen.

z - mu_c is whitened as L^-1 (z - m) - L^-1 (mu_c - m), where m is the mean of the anchors. Classes are ranked by the
expanded square, which costs one matrix product. The distances of the first two classes are then computed again from
differences, so they are as exact as L^-1 (z - m) itself.

Rounding can exchange two classes in the ranking if their squared distances differ by less than about 1e-6 of the
largest |L^-1 (z - m)|^2 or |L^-1 (mu_c - m)|^2. This happens if one anchor is much farther from the mean than the
samples are from their anchors. Similarities that differ by less than about 1e-6 can be exchanged, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tadperf.kernels import gpu, native, registry
from tadperf.kernels.checks import check_dense, check_memory
from tadperf.kernels.dispatch import Route, record_call, route
from tadperf.kernels.native import ELEMENT_TYPES
from tadperf.kernels.shared import Reliability, centre_and_directions

registry.register("reliability")


def reliability(features: Tensor, anchors: Tensor, cholesky: Tensor) -> Reliability:
    """Finds the two best anchors by Mahalanobis distance and by cosine (tadperf; formulas at the top of this file).

    features: float [..., D], any strides. anchors: float [C, D], C >= 1. cholesky: float [D, D], lower triangular with
    a positive diagonal; values above the diagonal are not read. Returns float32 (float64 for float64 features) and
    int64 [...], without a gradient. float32, bfloat16 and float16 are computed in float32. They run compiled code on a
    CPU, on torch.get_num_threads() threads, with the same bits for any number of threads. On CUDA they run Triton
    and do not wait for the device. Everything else runs `reliability_reference`.
    Raises ValueError for wrong shapes and types and, on a CPU, for a diagonal that is not positive.
    """
    _check(features, anchors, cholesky)
    if features.ndim != 2:
        flat = reliability(features.reshape(-1, features.shape[-1]), anchors, cholesky)
        return Reliability(*(result.view(features.shape[:-1]) for result in flat))
    chosen = route("reliability", features, anchors, cholesky)
    features, anchors, cholesky = features.detach(), anchors.detach(), cholesky.detach()
    if chosen is Route.REFERENCE:
        return reliability_reference(features, anchors, cholesky)
    if chosen is Route.DISPATCHER:
        # Not `_operator(...)`: PyTorch 2.15 hides a direct call that has only tensors as arguments from its profiler.
        return Reliability(*torch.ops.tadperf.reliability(features, anchors, cholesky))
    return _forward(features, anchors, cholesky)


@torch.no_grad()
def reliability_reference(features: Tensor, anchors: Tensor, cholesky: Tensor) -> Reliability:
    """Computes `reliability` in plain PyTorch, on any device and float type, in blocks of 2^20 elements.

    Its matrix products may round equal anchors differently. Then the lowest class does not always come first.
    """
    _check(features, anchors, cholesky)
    _check_diagonal(cholesky)
    rows, dtype = features.reshape(-1, features.shape[-1]), _result_dtype(features)
    cholesky = cholesky.to(dtype)
    centre, directions = centre_and_directions(anchors, dtype)
    whitened = _whiten(anchors.to(dtype) - centre, cholesky)
    step = max(1, 2**20 // max(anchors.shape))
    blocks = [_block(z.to(dtype), centre, whitened, directions, cholesky) for z in rows.split(step)]
    results = [torch.cat(parts) for parts in zip(*blocks, strict=True)]
    return Reliability(*(result.view(features.shape[:-1]) for result in results))


def _whiten(differences: Tensor, cholesky: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(cholesky, differences.mT, upper=False).mT


def _top_two(scores: Tensor) -> Tensor:
    """Returns the columns of the two largest scores of each row [N, 2]. The lowest column wins a tie; -1 means none."""
    scores = torch.where(scores.isnan(), -float("inf"), scores)
    columns = []
    for _ in range(2):
        best = scores.amax(-1, keepdim=True)
        # argmax alone may return any of several maxima: this takes the first
        column = (scores == best).byte().argmax(-1, keepdim=True)
        columns.append(torch.where(best > -float("inf"), column, -1))
        scores = scores.scatter(-1, column, -float("inf"))
    return torch.cat(columns, -1)


def _block(z: Tensor, centre: Tensor, whitened: Tensor, directions: Tensor, cholesky: Tensor) -> tuple[Tensor, ...]:
    y, length = _whiten(z - centre, cholesky), z.norm(dim=-1, keepdim=True)
    cosines = z @ directions.mT
    similar = _top_two(cosines)
    cosine = (cosines.gather(-1, similar.clamp(min=0)) / torch.where(length > 0, length, 1)).clamp(-1, 1)
    near = _top_two(2 * (y @ whitened.mT) - whitened.square().sum(-1))
    distance = (y.unsqueeze(1) - whitened[near.clamp(min=0)]).norm(dim=-1)
    distance = torch.where(near >= 0, distance, float("inf"))
    swap = (distance[:, 1] < distance[:, 0]) | ((distance[:, 1] == distance[:, 0]) & (near[:, 1] < near[:, 0]))
    order = torch.stack([swap, ~swap], -1).long()
    near, distance = near.gather(-1, order), distance.gather(-1, order)
    return *_defined(near, distance), *_defined(similar, torch.where(length.isfinite(), cosine, float("nan")))


def _defined(columns: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    defined = (columns >= 0) & values.isfinite()
    columns, values = torch.where(defined, columns, -1), torch.where(defined, values, float("nan"))
    return columns[:, 0], values[:, 0], columns[:, 1], values[:, 1]


def _result_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _check(features: Tensor, anchors: Tensor, cholesky: Tensor) -> None:
    check_dense(features=features, anchors=anchors, cholesky=cholesky)
    if not features.is_floating_point() or features.ndim < 1 or features.shape[-1] < 1:
        raise ValueError(
            f"features: {features.dtype} {tuple(features.shape)}: expected floats [..., D] with D of 1 or more"
        )
    width = features.shape[-1]
    if not anchors.is_floating_point() or anchors.ndim != 2 or anchors.shape[0] < 1 or anchors.shape[1] != width:
        raise ValueError(
            f"anchors: {anchors.dtype} {tuple(anchors.shape)}: expected floats [C, {width}] with C of 1 or more"
        )
    if not cholesky.is_floating_point() or cholesky.shape != (width, width):
        raise ValueError(f"cholesky: {cholesky.dtype} {tuple(cholesky.shape)}: expected floats [{width}, {width}]")
    for name, tensor in (("anchors", anchors), ("cholesky", cholesky)):
        if tensor.device != features.device:
            raise ValueError(f"{name}: on {tensor.device}: expected {features.device}, like the features")


def _check_diagonal(cholesky: Tensor) -> None:
    if cholesky.device.type != "cpu":
        return  # reading a value would wait for the device
    diagonal = cholesky.diagonal()
    wrong = ~((diagonal > 0) & diagonal.isfinite())
    if wrong.any():
        row = int(wrong.byte().argmax())
        raise ValueError(f"cholesky: {diagonal[row].item():g} on the diagonal at row {row}: expected positive numbers")


def _native(features: Tensor, anchors: Tensor, cholesky: Tensor) -> Reliability:
    _check_diagonal(cholesky)
    centre, directions = centre_and_directions(anchors, torch.float32)
    rows, types = len(features), (torch.int64, torch.float32) * 4
    out = Reliability(*(features.new_empty(rows, dtype=dtype) for dtype in types))
    matrices = anchors.float().contiguous(), directions, centre, cholesky.float().contiguous()
    native.call("reliability", features, *matrices, *out)
    return out


def _forward(features: Tensor, anchors: Tensor, cholesky: Tensor) -> Reliability:
    check_memory(features=features, anchors=anchors, cholesky=cholesky)
    if features.dtype in ELEMENT_TYPES and features.device.type == "cpu" and native.available():
        record_call("reliability", "cpu")
        return _native(features, anchors, cholesky)
    if features.dtype in ELEMENT_TYPES and features.device.type == "cuda" and gpu.available():
        from tadperf.kernels.gpu import reliability as triton

        record_call("reliability", "cuda")
        return triton.reliability(features, anchors, cholesky)
    record_call("reliability", None)
    return reliability_reference(features, anchors, cholesky)


@torch.library.custom_op("tadperf::reliability", mutates_args=())
def _operator(
    features: Tensor, anchors: Tensor, cholesky: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(features, anchors, cholesky)
    if features.ndim != 2:
        return reliability(features, anchors, cholesky)[:]
    return _forward(features, anchors, cholesky)[:]  # a plain tuple


@_operator.register_fake
def _(
    features: Tensor, anchors: Tensor, cholesky: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, floats = features.shape[:-1], _result_dtype(features)
    return Reliability(*(features.new_empty(shape, dtype=dtype) for dtype in (torch.int64, floats) * 4))[:]
