"""`mixture` in Triton: sorts the samples by group, then one program does the whole fit of one group.

Everything is in float64, as on a CPU: if components overlap, EM amplifies the rounding error of each step. The losses
of a group stay in the caches of the multiprocessor, which reads them dozens of times. Sums run over fixed tiles in a
fixed order, so every run gives the same bits. Samples with a group out of range are ignored, because reporting them
would mean waiting for the device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels import shared
from tadperf.kernels.gpu import on_device
from tadperf.kernels.gpu.launch_configs import launch_config

HALF_LOG_TWO_PI = tl.constexpr(math.log(2 * math.pi) / 2)
TINY = tl.constexpr(shared.TINY)
SLACK = tl.constexpr(shared.SLACK)
MAX_CUTS = tl.constexpr(shared.MAX_CUTS)
SMALLEST_PART = tl.constexpr(shared.SMALLEST_PART)
TILES = tl.constexpr(512)  # a product of 512 numbers up to 2 does not overflow, so one log serves all of them


@triton.jit
def _load(x_ptr, i, end, low, scale):
    """Returns the losses i of the group, scaled to 0..1. Lanes beyond the end hold a value that callers must mask."""
    return (tl.load(x_ptr + i, mask=i < end, other=0.0).to(tl.float64) - low) * scale


@triton.jit
def _extent(x_ptr, begin, end, BLOCK: tl.constexpr):
    """Returns the smallest and the largest loss of the group."""
    low = tl.full([BLOCK], float("inf"), tl.float64)
    high = tl.full([BLOCK], float("-inf"), tl.float64)
    for tile in range(begin, end, BLOCK):
        i = tile + tl.arange(0, BLOCK)
        low = tl.minimum(low, tl.load(x_ptr + i, mask=i < end, other=float("inf")).to(tl.float64))
        high = tl.maximum(high, tl.load(x_ptr + i, mask=i < end, other=float("-inf")).to(tl.float64))
    return tl.min(low, 0), tl.max(high, 0)


@triton.jit
def _above(x_ptr, begin, end, low, scale, cut, centre, BLOCK: tl.constexpr):
    """Returns the count, the sum and the sum of squares of z - centre over the samples above the cut."""
    n = tl.zeros([BLOCK], tl.float64)
    first = tl.zeros([BLOCK], tl.float64)
    second = tl.zeros([BLOCK], tl.float64)
    for tile in range(begin, end, BLOCK):
        i = tile + tl.arange(0, BLOCK)
        z = _load(x_ptr, i, end, low, scale)
        part = (i < end) & (z > cut)
        c = tl.where(part, z - centre, 0.0)
        n += part.to(tl.float64)
        first += c
        second += c * c
    return tl.sum(n, 0), tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _pack(odds, m0, m1, v0, v1):
    """Packs a mixture in one vector: log(w_0 / w_1), m_0, m_1, log v_0, log v_1, then zeros."""
    i = tl.arange(0, 8)
    positive = tl.where(i == 0, odds, tl.where(i == 3, v0, tl.where(i == 4, v1, 1.0)))
    return tl.where(i == 1, m0, tl.where(i == 2, m1, tl.log(positive)))


@triton.jit
def _at(theta, k: tl.constexpr):
    """Returns element k of a packed mixture."""
    return tl.sum(tl.where(tl.arange(0, 8) == k, theta, 0.0), 0)


@triton.jit
def _log_sigmoid(x):
    """Returns log(1 / (1 + exp(-x))) without overflow."""
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _gaussians(theta):
    """Returns the mean, half of the precision (1 / variance) and the height of each component.

    The log-density of a component is height - half_precision (z - mean)^2 - log(2 pi) / 2.
    """
    i = tl.arange(0, 8)
    odds = _at(theta, 0)
    log_w = _log_sigmoid(tl.where(i == 3, odds, -odds))  # in the lanes of log v_0 and log v_1
    height = log_w - theta / 2
    half = 0.5 * tl.exp(-theta)
    return _at(theta, 1), _at(half, 3), _at(height, 3), _at(theta, 2), _at(half, 4), _at(height, 4)


@triton.jit
def _shares(u, half0, height0, w, half1, height1):
    """Returns the probabilities of both components, then a and b. The log-density is a + log(b) - log(2 pi) / 2.

    u, w: deviations from the two means.
    """
    a = height0 - u * u * half0
    b = height1 - w * w * half1
    e = tl.exp(-tl.abs(a - b))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(a >= b, large, small), tl.where(a >= b, small, large), tl.maximum(a, b), 1.0 + e


@triton.jit
def _step(x_ptr, begin, end, low, scale, added, theta, BLOCK: tl.constexpr):
    """Takes one step of EM. Returns the next theta, and the total log-density at the current one."""
    m0, half0, height0, m1, half1, height1 = _gaussians(theta)  # pyright: ignore[reportGeneralTypeIssues]
    n0 = tl.zeros([BLOCK], tl.float64)
    n1 = tl.zeros([BLOCK], tl.float64)
    first0 = tl.zeros([BLOCK], tl.float64)
    first1 = tl.zeros([BLOCK], tl.float64)
    second0 = tl.zeros([BLOCK], tl.float64)
    second1 = tl.zeros([BLOCK], tl.float64)
    density = tl.zeros([BLOCK], tl.float64)
    for chunk in range(begin, end, TILES * BLOCK):
        product = tl.full([BLOCK], 1.0, tl.float64)
        for tile in range(chunk, tl.minimum(chunk + TILES * BLOCK, end), BLOCK):
            i = tile + tl.arange(0, BLOCK)
            z = _load(x_ptr, i, end, low, scale)
            u = z - m0
            w = z - m1
            p, q, part, excess = _shares(u, half0, height0, w, half1, height1)
            p = tl.where(i < end, p, 0.0)
            q = tl.where(i < end, q, 0.0)
            density += tl.where(i < end, part, 0.0)
            product *= tl.where(i < end, excess, 1.0)
            n0 += p
            n1 += q
            first0 += p * u
            first1 += q * w
            second0 += p * u * u
            second1 += q * w * w
        density += tl.log(product)
    owned0 = tl.sum(n0, 0) + TINY
    owned1 = tl.sum(n1, 0) + TINY
    shift0 = tl.sum(first0, 0) / owned0
    shift1 = tl.sum(first1, 0) / owned1
    v0 = tl.maximum(tl.sum(second0, 0) / owned0 - shift0 * shift0, 0.0) + added
    v1 = tl.maximum(tl.sum(second1, 0) / owned1 - shift1 * shift1, 0.0) + added
    following = _pack(owned0 / owned1, m0 + shift0, m1 + shift1, v0, v1)
    return following, tl.sum(density, 0)


@triton.jit
def _start(x_ptr, begin, end, low, scale, floor, BLOCK: tl.constexpr):
    """Cuts the group in two parts. Returns theta, and the floor of the variances."""
    count = (end - begin).to(tl.float64)
    n, total, square = _above(x_ptr, begin, end, low, scale, -1.0, 0.0, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    mean = total / count
    n, first, square = _above(x_ptr, begin, end, low, scale, -1.0, mean, BLOCK)
    cut = mean
    n, first, second = _above(x_ptr, begin, end, low, scale, cut, mean, BLOCK)
    left = tl.full([], MAX_CUTS, tl.int32)
    while left > 0:
        following = mean + (first / n - first / (count - n)) / 2
        found, found_first, found_second = _above(x_ptr, begin, end, low, scale, following, mean, BLOCK)
        moves = (tl.minimum(found, count - found) * SMALLEST_PART >= count) & (following != cut)
        cut = tl.where(moves, following, cut)
        n = tl.where(moves, found, n)
        first = tl.where(moves, found_first, first)
        second = tl.where(moves, found_second, second)
        left = tl.where(moves, left - 1, 0)
    below = -first / (count - n)
    above = first / n
    added = floor * square / count
    v0 = tl.maximum((square - second) / (count - n) - below * below, 0.0) + added
    v1 = tl.maximum(second / n - above * above, 0.0) + added
    return _pack((count - n) / n, mean + below, mean + above, v0, v1), added


@triton.jit
def _fit(x_ptr, begin, end, low, scale, floor, rounds, tolerance, BLOCK: tl.constexpr):
    """Runs EM in rounds of three steps and extrapolates each third step. Returns theta and the number of steps."""
    theta, added = _start(x_ptr, begin, end, low, scale, floor, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    slack = SLACK * (end - begin).to(tl.float64)
    limit = tl.full([], 1.0, tl.float64)  # the longest extrapolation; 1 is a plain step
    steps = tl.full([], 0, tl.int64)
    left = rounds
    i = tl.arange(0, 8)
    while left > 0:
        one, before = _step(x_ptr, begin, end, low, scale, added, theta, BLOCK)
        two, before = _step(x_ptr, begin, end, low, scale, added, one, BLOCK)
        r = one - theta
        v = two - one - r
        unit = tl.exp(-0.5 * tl.where(i == 1, _at(theta, 3), tl.where(i == 2, _at(theta, 4), 0.0)))
        step = tl.sqrt(tl.sum(r * unit * r * unit, 0))
        change = tl.sqrt(tl.sum(v * unit * v * unit, 0))
        reach = tl.where(change > 0, tl.maximum(step / change, 1.0), 1.0)
        done = step * reach < tolerance  # step / (1 - rate of convergence) estimates the distance
        reach = tl.minimum(reach, limit)
        far = theta + 2 * reach * r + reach * reach * v
        three, after = _step(x_ptr, begin, end, low, scale, added, far, BLOCK)
        better = after >= before - slack
        limit = tl.where(better, tl.where(reach == limit, 4 * limit, limit), tl.maximum(limit / 4, 1.0))
        theta = tl.where(better & (done == 0), three, two)
        steps += tl.where(done, 2, 3)
        left = tl.where(done, 0, left - 1)
    return theta, steps


@triton.jit
def _write(x_ptr, sample_ptr, posterior_ptr, begin, end, low, scale, theta, lower, fits, monotone, BLOCK: tl.constexpr):
    """Writes the posteriors of a group in the order of the samples. Returns the total log-density."""
    m0, half0, height0, m1, half1, height1 = _gaussians(theta)  # pyright: ignore[reportGeneralTypeIssues]
    turn = (m0 * half0 - m1 * half1) / (half0 - half1)  # turning point of the odds; it does not lie between the means
    lowest = tl.where(monotone & ((half0 > half1) == lower), turn, -1.0)
    highest = tl.where(monotone & ((half0 < half1) == lower), turn, 2.0)
    density = tl.zeros([BLOCK], tl.float64)
    for tile in range(begin, end, BLOCK):
        i = tile + tl.arange(0, BLOCK)
        z = _load(x_ptr, i, end, low, scale)
        p, q, part, excess = _shares(z - m0, half0, height0, z - m1, half1, height1)
        density += tl.where(i < end, part + tl.log(excess), 0.0)
        z = tl.minimum(tl.maximum(z, lowest), highest)
        p, q, part, excess = _shares(z - m0, half0, height0, z - m1, half1, height1)
        to = tl.load(sample_ptr + i, mask=i < end, other=0)
        p = tl.where(lower, p, q)
        tl.store(posterior_ptr + to, tl.where(fits, p, 1.0).to(tl.float32), mask=i < end)
    return tl.sum(density, 0)


@triton.jit(do_not_specialize=["rounds", "monotone"])
def mixture_kernel(
    x_ptr,  # losses, sorted by group
    sample_ptr,  # index of the sample of each loss
    begins_ptr,  # where each group begins, and the end of the last one
    posterior_ptr,
    weight_ptr,
    mean_ptr,
    variance_ptr,
    iterations_ptr,
    log_likelihood_ptr,
    rounds,
    tolerance: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    floor: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    monotone,
    BLOCK: tl.constexpr,
):
    """Runs EM on one group per program. Writes all six results, with the component of the lower mean first."""
    group = tl.program_id(0).to(tl.int64)
    begin = tl.load(begins_ptr + group)
    end = tl.load(begins_ptr + group + 1)
    low, high = _extent(x_ptr, begin, end, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    span = high - low
    fits = span > 0  # false if the group is empty (-inf) or all losses are equal
    scale = 1.0 / tl.where(fits, span, 1.0)
    theta, steps = _fit(x_ptr, begin, end, low, scale, floor, tl.where(fits, rounds, 0), tolerance, BLOCK)
    lower = (_at(theta, 1) <= _at(theta, 2)) | (fits == 0)  # whether component 0 has the lower mean
    density = _write(x_ptr, sample_ptr, posterior_ptr, begin, end, low, scale, theta, lower, fits, monotone != 0, BLOCK)

    count = (end - begin).to(tl.float64)
    nan = float("nan")
    one = tl.where(count > 0, 1.0, nan)
    point = tl.where(count > 0, low, nan)
    here = 2 * group + tl.where(lower, 0, 1)
    there = 2 * group + tl.where(lower, 1, 0)
    w0 = 1.0 / (1.0 + tl.exp(-_at(theta, 0)))
    w1 = 1.0 / (1.0 + tl.exp(_at(theta, 0)))
    v = span * span * tl.exp(theta)
    tl.store(weight_ptr + here, tl.where(fits, w0, one))
    tl.store(weight_ptr + there, tl.where(fits, w1, one - 1))
    tl.store(mean_ptr + here, tl.where(fits, low + span * _at(theta, 1), point))
    tl.store(mean_ptr + there, tl.where(fits, low + span * _at(theta, 2), point))
    tl.store(variance_ptr + here, tl.where(fits, _at(v, 3), one - 1))
    tl.store(variance_ptr + there, tl.where(fits, _at(v, 4), one - 1))
    tl.store(iterations_ptr + group, steps)
    total = density - count * (HALF_LOG_TWO_PI + tl.log(tl.where(fits, span, 1.0)))
    tl.store(log_likelihood_ptr + group, tl.where(fits, total, nan))


def mixture(
    losses: Tensor, groups: Tensor, num_groups: int, iterations: int, tolerance: float, floor: float, monotone: bool
) -> tuple[Tensor, ...]:
    """Returns the six results of `mixture` for checked losses and groups [N]. Does not wait for the device."""
    used = losses.isfinite() & (groups >= 0) & (groups < num_groups)
    keys, sample = torch.where(used, groups, num_groups).int().sort(stable=True)
    begins = torch.searchsorted(keys, torch.arange(num_groups + 1, device=keys.device, dtype=torch.int32))
    posterior = torch.full_like(losses, torch.nan, dtype=torch.float32)
    in_range = (groups >= 0) & (groups < num_groups)
    posterior.masked_fill_(in_range & (losses < 0), 1.0).masked_fill_(in_range & (losses > 0), 0.0)
    weight, mean, variance = (losses.new_empty(num_groups, 2, dtype=torch.float64) for _ in range(3))
    steps, total = (losses.new_empty(num_groups, dtype=dtype) for dtype in (torch.int64, torch.float64))
    config = launch_config("mixture", losses.device, len(losses) // num_groups)
    with on_device(losses):
        mixture_kernel[(num_groups,)](
            losses.float()[sample],
            sample,
            begins,
            posterior,
            weight,
            mean,
            variance,
            steps,
            total,
            iterations // 3,
            tolerance,
            floor,
            int(monotone),
            **config,  # pyright: ignore[reportArgumentType]
        )
    return posterior, weight, mean, variance, steps, total
