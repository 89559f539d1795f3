"""Fits a Gaussian mixture of two components to the losses of each group, all groups in one call.

In a group the losses follow w_0 N(m_0, v_0) + w_1 N(m_1, v_1), fitted by EM (Dempster, Laird and Rubin, 1977). Samples
with a wrong label gather in the component of the higher mean (DivideMix; Li, Socher and Hoi, 2020). One step of EM over
n samples, with p_ik the probability that sample i comes from component k:

    p_ik ~ w_k N(x_i; m_k, v_k)    w_k = sum_i p_ik / n    m_k = sum_i p_ik x_i / n w_k
    v_k = sum_i p_ik (x_i - m_k)^2 / n w_k + floor V

V is the variance of the group. With this floor, shifting or scaling the losses shifts or scales the fit and changes no
posterior. It equals sklearn's reg_covar on standardised losses.

Start: the group is cut in two parts, and each component takes the moments of one part. The first cut is the mean. It
then moves by two-means (Lloyd) as long as both parts keep 2 % of the samples, so that one outlier cannot be a part.
Acceleration: plain EM may take thousands of steps, so every third step is extrapolated (SQUAREM; Varadhan and Roland,
2008, S3) and undone if the likelihood falls. The fixed points are those of EM.

Losses that are not finite are not part of the fit. Their posterior is NaN for NaN, 0 for +inf, 1 for -inf. If all
losses of a group are equal, one component remains: weights (1, 0), both means that loss, variances 0, posterior 1,
log-likelihood NaN. A group without losses has NaN everywhere.

Far from the means, on both sides, the wider Gaussian has the higher density. So the posterior of component 0 is not
monotone: far below m_0 it falls again if v_0 < v_1, and far above m_1 it rises again if v_0 > v_1. With `monotone` the
posterior is constant beyond the turning point, which does not lie between the means. Nothing else changes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tadperf.kernels import gpu, native, registry
from tadperf.kernels.checks import check_dense, check_memory
from tadperf.kernels.dispatch import Route, record_call, route
from tadperf.kernels.shared import MAX_CUTS, SLACK, SMALLEST_PART, TINY

registry.register("mixture")


class Mixture(NamedTuple):
    """Results of `mixture`: the posterior [...] of the component with the lower mean, and five results for each group.

    In weight, mean and variance the component with the lower mean comes first.
    """

    posterior: Tensor
    weight: Tensor
    mean: Tensor
    variance: Tensor
    iterations: Tensor
    log_likelihood: Tensor


def mixture(
    losses: Tensor,
    groups: Tensor | None = None,
    num_groups: int = 1,
    *,
    iterations: int = 10_000,
    tolerance: float = 1e-7,
    floor: float = 1e-6,
    monotone: bool = False,
) -> Mixture:
    """Fits each group; returns each sample's posterior of the low-loss component (tadperf; formulas at the top).

    losses: float [...], any strides. groups: int32 or int64 [...], 0 to G-1 for G = num_groups, or -1 to ignore the
    sample (its posterior is NaN); None puts all samples in one group. iterations: maximum number of EM steps of a
    group. tolerance: a group is done when its estimated distance to the fixed point is below this. The distance of a
    mean is in standard deviations, that of a variance or of the ratio of the weights in natural logarithms.
    floor: share of the variance of the group that is added to the variance of each component. sklearn's reg_covar is
    absolute: floor = reg_covar / variance. Losses with a peak at 0, as of a network in training, need about 1e-2, or
    else the lower component shrinks onto the peak. monotone: see the top of this file.
    Returns posterior float32 (float64 for float64 losses) [...], weight, mean and variance float64 [G, 2], iterations
    int64 [G] (steps taken) and log_likelihood float64 [G] (sum over the samples of the group, nats). No result has a
    gradient. All types are computed in float64. On a CPU float32, bfloat16 and float16 run compiled code, on
    torch.get_num_threads() threads, with the same bits for any number of threads. On CUDA they run Triton.
    Raises ValueError for wrong shapes, types, groups or settings. CUDA does not check groups, because that would wait
    for the device: a group out of range counts as -1.
    """
    if groups is None:
        check_dense(losses=losses)
        groups = torch.zeros(losses.shape, dtype=torch.int64, device=losses.device)
    _check(losses, groups, num_groups, iterations, tolerance, floor)
    chosen = route("mixture", losses, groups)
    losses = losses.detach()
    if chosen is Route.REFERENCE:
        return mixture_reference(
            losses, groups, num_groups, iterations=iterations, tolerance=tolerance, floor=floor, monotone=monotone
        )
    run = _operator if chosen is Route.DISPATCHER else _forward
    return Mixture(*run(losses, groups, num_groups, iterations, float(tolerance), float(floor), bool(monotone)))


@torch.no_grad()
def mixture_reference(
    losses: Tensor,
    groups: Tensor,
    num_groups: int,
    *,
    iterations: int = 10_000,
    tolerance: float = 1e-7,
    floor: float = 1e-6,
    monotone: bool = False,
) -> Mixture:
    """Computes `mixture` in plain PyTorch, on any device and float type. Each step handles all groups, in float64."""
    _check(losses, groups, num_groups, iterations, tolerance, floor)
    if ((groups < -1) | (groups >= num_groups)).any():
        raise ValueError(_out_of_range(groups, num_groups))
    x, group = losses.double().flatten(), groups.long().flatten()
    used = (x.isfinite() & (group >= 0)).nonzero().squeeze(1)
    z, g = x[used], group[used]
    ends = z.new_full((2, num_groups), math.inf)
    low = ends[0].scatter_reduce(0, g, z, "amin")
    span = -ends[1].scatter_reduce(0, g, -z, "amin") - low
    count = g.bincount(minlength=num_groups)
    fits = span > 0
    z = torch.where(fits[g], (z - low[g]) / span[g], 0)
    theta, added = _start(z, g, count, floor)
    theta, steps = _fit(theta, z, g, count, added, fits, iterations, tolerance)
    theta = torch.where(
        (theta[:, 1] > theta[:, 2])[:, None], theta[:, [0, 2, 1, 4, 3]] * theta.new_tensor([-1, 1, 1, 1, 1]), theta
    )
    shares, density = _shares(theta, _clamp_at_turn(theta, z, g) if monotone else z, g)
    if monotone:
        density = _shares(theta, z, g)[1]
    posterior = torch.where(x == -math.inf, 1.0, torch.where(x == math.inf, 0.0, math.nan)).double()
    posterior[group < 0] = math.nan
    posterior[used] = torch.where(fits[g], shares[0], 1)

    def pairs(one: Tensor, other: Tensor, single: Tensor, absent: Tensor) -> Tensor:
        return torch.where(fits[:, None], torch.stack([one, other], 1), torch.stack([single, absent], 1))

    odds, m0, m1, log_v0, log_v1 = theta.unbind(1)
    one = torch.where(count > 0, 1.0, math.nan).double()
    point = torch.where(count > 0, low, math.nan)
    total = _sums(g, num_groups, density)[0] - count * (math.log(2 * math.pi) / 2 + span.log())
    return Mixture(
        posterior=posterior.to(losses.dtype if losses.dtype == torch.float64 else torch.float32).view(losses.shape),
        weight=pairs(odds.sigmoid(), (-odds).sigmoid(), one, one - 1),
        mean=pairs(low + span * m0, low + span * m1, point, point),
        variance=pairs(span**2 * log_v0.exp(), span**2 * log_v1.exp(), one - 1, one - 1),
        iterations=steps,
        log_likelihood=torch.where(fits, total, math.nan),
    )


def _sums(g: Tensor, num_groups: int, *terms: Tensor) -> tuple[Tensor, ...]:
    """Returns the sum of each term [N] over each group, as [G]."""
    # bincount is three times as fast as one index_add_ of all terms. Without samples it returns int64.
    return tuple(g.bincount(term, minlength=num_groups).to(term.dtype) for term in terms)


def _start(z: Tensor, g: Tensor, count: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Cuts each group in two parts. Returns theta [G, 5] and the floor of the variances [G].

    theta is log(w_0 / w_1), m_0, m_1, log v_0, log v_1. These are unbounded, so any extrapolation is a mixture.
    """
    groups = len(count)
    mean = _sums(g, groups, z)[0] / count
    c = z - mean[g]
    square = _sums(g, groups, c * c)[0]

    def above(cut: Tensor) -> tuple[Tensor, ...]:
        part = (c > cut[g]).to(z.dtype)
        return _sums(g, groups, part, part * c, part * c * c)

    cut = torch.zeros_like(mean)
    n, first, second = above(cut)
    for _ in range(MAX_CUTS):
        following = (first / n - first / (count - n)) / 2
        found = above(following)
        moves = torch.minimum(found[0], count - found[0]) * SMALLEST_PART >= count
        cut = torch.where(moves, following, cut)
        n, first, second = (torch.where(moves, new, old) for new, old in zip(found, (n, first, second), strict=True))
    low, high, added = -first / (count - n), first / n, floor * square / count
    log_v0 = (((square - second) / (count - n) - low**2).clamp(min=0) + added).log()
    log_v1 = ((second / n - high**2).clamp(min=0) + added).log()
    return torch.stack([(count - n).log() - n.log(), mean + low, mean + high, log_v0, log_v1], 1), added


def _shares(theta: Tensor, z: Tensor, g: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Returns the probabilities of components 0 and 1, and the log-density plus log(2 pi) / 2, of each sample."""
    odds, m0, m1, log_v0, log_v1 = theta.unbind(1)
    a = (logsigmoid(odds) - log_v0 / 2)[g] - (z - m0[g]) ** 2 * (0.5 * (-log_v0).exp())[g]
    b = (logsigmoid(-odds) - log_v1 / 2)[g] - (z - m1[g]) ** 2 * (0.5 * (-log_v1).exp())[g]
    return ((a - b).sigmoid(), (b - a).sigmoid()), torch.logaddexp(a, b)


def _step(theta: Tensor, z: Tensor, g: Tensor, count: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Takes one step of EM. Returns the next theta, and at the current one the mean log-density plus log(2 pi) / 2."""
    means = theta[:, 1:3]
    (p, q), density = _shares(theta, z, g)
    u, w = (z - means[g, k] for k in (0, 1))
    sums = torch.stack(_sums(g, len(count), p, q, p * u, q * w, p * u * u, q * w * w, density), 1)
    owned = sums[:, :2] + TINY
    shift = sums[:, 2:4] / owned
    log_v = ((sums[:, 4:6] / owned - shift**2).clamp(min=0) + added[:, None]).log()
    log_owned = owned.log()
    odds = log_owned[:, :1] - log_owned[:, 1:]
    return torch.cat([odds, means + shift, log_v], 1), sums[:, 6] / count


def _fit(
    theta: Tensor, z: Tensor, g: Tensor, count: Tensor, added: Tensor, fits: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Runs EM in rounds of three steps and extrapolates each third step. Returns theta and the number of steps [G]."""
    limit = torch.ones_like(added)  # the longest extrapolation; 1 is a plain step
    steps = torch.zeros_like(count)
    going = fits
    for _ in range(iterations // 3):
        if not going.any():
            break
        one, _ = _step(theta, z, g, count, added)
        two, before = _step(one, z, g, count, added)
        r, v = one - theta, two - 2 * one + theta
        unit = torch.cat([torch.ones_like(theta[:, :1]), (-theta[:, 3:] / 2).exp(), torch.ones_like(r[:, :2])], 1)
        step, change = (r * unit).norm(dim=1), (v * unit).norm(dim=1)
        reach = torch.where(change > 0, step / change, 1).clamp(min=1)
        done = step * reach < tolerance  # step / (1 - rate of convergence) estimates the distance
        reach = torch.minimum(reach, limit)
        far, after = _step(theta + 2 * reach[:, None] * r + reach[:, None] ** 2 * v, z, g, count, added)
        better = after >= before - SLACK
        limit = torch.where(better, torch.where(reach == limit, 4 * limit, limit), (limit / 4).clamp(min=1))
        theta = torch.where(going[:, None], torch.where((better & ~done)[:, None], far, two), theta)
        steps += torch.where(done, 2, 3) * going
        going = going & ~done
    return theta, steps


def _clamp_at_turn(theta: Tensor, z: Tensor, g: Tensor) -> Tensor:
    """Clamps z at the turning point of the odds: from below if v_0 < v_1 (it is below m_0), else from above."""
    _, m0, m1, log_v0, log_v1 = theta.unbind(1)
    v0, v1 = log_v0.exp(), log_v1.exp()
    turn = (m0 * v1 - m1 * v0) / (v1 - v0)
    lowest = torch.where(v0 < v1, turn, -math.inf)
    highest = torch.where(v0 > v1, turn, math.inf)
    return torch.minimum(torch.maximum(z, lowest[g]), highest[g])


def _check(losses: Tensor, groups: Tensor, num_groups: int, iterations: int, tolerance: float, floor: float) -> None:
    check_dense(losses=losses, groups=groups)
    if not losses.is_floating_point():
        raise ValueError(f"losses: {losses.dtype} {tuple(losses.shape)}: expected floats")
    if groups.dtype not in (torch.int32, torch.int64) or groups.shape != losses.shape:
        raise ValueError(f"groups: {groups.dtype} {tuple(groups.shape)}: expected int32 or int64 {tuple(losses.shape)}")
    if groups.device != losses.device:
        raise ValueError(f"groups: on {groups.device}: expected {losses.device}, like the losses")
    if num_groups < 1:
        raise ValueError(f"num_groups: {num_groups}: expected 1 or more")
    if iterations < 3:
        raise ValueError(f"iterations: {iterations}: expected 3 or more (one round has 3 steps)")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: {tolerance}: expected 0 or more")
    if not floor > 0:
        raise ValueError(f"floor: {floor}: expected more than 0")


def _out_of_range(groups: Tensor, num_groups: int) -> str:
    sample = int(((groups < -1) | (groups >= num_groups)).flatten().nonzero()[0])
    found = int(groups.flatten()[sample])
    return f"groups: {found} at sample {sample}: expected 0 to {num_groups - 1}, or -1 to ignore"


def _empty(losses: Tensor, num_groups: int) -> Mixture:
    dtype = torch.float64 if losses.dtype == torch.float64 else torch.float32
    weight, mean, variance = (losses.new_empty(num_groups, 2, dtype=torch.float64) for _ in range(3))
    return Mixture(
        losses.new_empty(losses.shape, dtype=dtype),
        weight,
        mean,
        variance,
        losses.new_empty(num_groups, dtype=torch.int64),
        losses.new_empty(num_groups, dtype=torch.float64),
    )


def _native(losses: Tensor, groups: Tensor, num_groups: int, *options: float) -> Mixture:
    out = _empty(losses, num_groups)
    flat = losses.detach().float().reshape(-1), groups.reshape(-1), out.posterior.view(-1)
    if native.call("mixture", *flat, *out[1:], *options, SLACK, TINY, MAX_CUTS, SMALLEST_PART) >= 0:
        raise ValueError(_out_of_range(groups, num_groups))
    return out


def _forward(
    losses: Tensor, groups: Tensor, num_groups: int, iterations: int, tolerance: float, floor: float, monotone: bool
) -> Mixture:
    check_memory(losses=losses, groups=groups)
    options = num_groups, iterations, tolerance, floor, monotone
    if losses.dtype != torch.float64:
        if losses.device.type == "cpu" == groups.device.type and native.available():
            record_call("mixture", "cpu")
            return _native(losses, groups, *options)
        if losses.is_cuda and groups.is_cuda and gpu.available():
            from tadperf.kernels.gpu import mixture as triton

            record_call("mixture", "cuda")
            posterior, *others = triton.mixture(losses.detach().reshape(-1), groups.reshape(-1), *options)
            return Mixture(posterior.view(losses.shape), *others)
    record_call("mixture", None)
    return mixture_reference(
        losses, groups, num_groups, iterations=iterations, tolerance=tolerance, floor=floor, monotone=monotone
    )


@torch.library.custom_op("tadperf::mixture", mutates_args=())
def _operator(
    losses: Tensor, groups: Tensor, num_groups: int, iterations: int, tolerance: float, floor: float, monotone: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(losses, groups, num_groups, iterations, tolerance, floor)
    return _forward(losses, groups, num_groups, iterations, tolerance, floor, monotone)[:]  # a plain tuple


@_operator.register_fake
def _(
    losses: Tensor, groups: Tensor, num_groups: int, iterations: int, tolerance: float, floor: float, monotone: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(losses, num_groups)[:]
