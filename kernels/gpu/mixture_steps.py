"""Device functions of `mixture`: passes over the losses of a group, and the algebra of EM between two passes.

Exponentials are in float32: that changed posteriors by 6e-8 where EM converges in 100 steps, and by 5e-6 where it takes
1000 and the components overlap. Their arguments, sums and everything else are in float64, because then EM amplifies the
rounding error of each step. Sums run over fixed tiles in a fixed order, so every run gives the same bits.
"""

# pyright: reportGeneralTypeIssues=false
# Triton declares no result for a jit function that calls another one, so its results cannot be unpacked for Pyright.

from __future__ import annotations

import math

import triton
import triton.language as tl

from tadperf.kernels import shared

HALF_LOG_TWO_PI = tl.constexpr(math.log(2 * math.pi) / 2)
TINY = tl.constexpr(shared.TINY)
SLACK = tl.constexpr(shared.SLACK)
MAX_CUTS = tl.constexpr(shared.MAX_CUTS)
SMALLEST_PART = tl.constexpr(shared.SMALLEST_PART)
TILES = tl.constexpr(512)  # a product of 512 numbers up to 2 does not overflow, so one log serves all of them


@triton.jit
def scaled_losses(x_ptr, i, end, low, scale):
    """Returns the losses i of the group, scaled to 0..1. Lanes beyond the end hold a value that callers must mask."""
    return (tl.load(x_ptr + i, mask=i < end, other=0.0).to(tl.float64) - low) * scale


@triton.jit
def extent(x_ptr, begin, end, BLOCK: tl.constexpr):
    """Returns the smallest and the largest loss of the group."""
    low = tl.full([BLOCK], float("inf"), tl.float64)
    high = tl.full([BLOCK], float("-inf"), tl.float64)
    for tile in range(begin, end, BLOCK):
        i = tile + tl.arange(0, BLOCK)
        low = tl.minimum(low, tl.load(x_ptr + i, mask=i < end, other=float("inf")).to(tl.float64))
        high = tl.maximum(high, tl.load(x_ptr + i, mask=i < end, other=float("-inf")).to(tl.float64))
    return tl.min(low, 0), tl.max(high, 0)


@triton.jit
def sums_above(x_ptr, begin, end, low, scale, cut, centre, BLOCK: tl.constexpr):
    """Returns the count, the sum and the sum of squares of z - centre over the samples above the cut."""
    n = tl.zeros([BLOCK], tl.float64)
    first = tl.zeros([BLOCK], tl.float64)
    second = tl.zeros([BLOCK], tl.float64)
    for tile in range(begin, end, BLOCK):
        i = tile + tl.arange(0, BLOCK)
        z = scaled_losses(x_ptr, i, end, low, scale)
        part = (i < end) & (z > cut)
        c = tl.where(part, z - centre, 0.0)
        n += part.to(tl.float64)
        first += c
        second += c * c
    return tl.sum(n, 0), tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def pack(odds, m0, m1, v0, v1):
    """Packs a mixture in one vector: log(w_0 / w_1), m_0, m_1, log v_0, log v_1, then zeros."""
    i = tl.arange(0, 8)
    positive = tl.where(i == 0, odds, tl.where(i == 3, v0, tl.where(i == 4, v1, 1.0)))
    return tl.where(i == 1, m0, tl.where(i == 2, m1, tl.log(positive)))


@triton.jit
def element(theta, k: tl.constexpr):
    """Returns element k of a packed mixture."""
    return tl.sum(tl.where(tl.arange(0, 8) == k, theta, 0.0), 0)


@triton.jit
def log_sigmoid(x):
    """Returns log(1 / (1 + exp(-x))) without overflow."""
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def gaussians(theta):
    """Returns the mean, half of the precision (1 / variance) and the height of each component.

    The log-density of a component is height - half_precision (z - mean)^2 - log(2 pi) / 2.
    """
    i = tl.arange(0, 8)
    odds = element(theta, 0)
    log_w = log_sigmoid(tl.where(i == 3, odds, -odds))  # in the lanes of log v_0 and log v_1
    height = log_w - theta / 2
    half = 0.5 * tl.exp(-theta)
    return (
        element(theta, 1),
        element(half, 3),
        element(height, 3),
        element(theta, 2),
        element(half, 4),
        element(height, 4),
    )


@triton.jit
def shares(u, half0, height0, w, half1, height1):
    """Returns the probabilities of both components, then a and b. The log-density is a + log(b) - log(2 pi) / 2.

    u, w: deviations from the two means. The probabilities and b are float32, computed from a float64 exponent.
    """
    a = height0 - u * (u * half0)
    b = height1 - w * (w * half1)
    e = tl.exp(-tl.abs(a - b).to(tl.float32))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(a >= b, large, small), tl.where(a >= b, small, large), tl.maximum(a, b), 1.0 + e


@triton.jit
def em_sums(x_ptr, begin, end, low, scale, theta, BLOCK: tl.constexpr):
    """Returns the sums of EM at theta: of p, q, p u, q w, p u^2, q w^2, and of the log-density."""
    m0, half0, height0, m1, half1, height1 = gaussians(theta)
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
            z = scaled_losses(x_ptr, i, end, low, scale)
            u = z - m0
            w = z - m1
            p, q, part, excess = shares(u, half0, height0, w, half1, height1)
            p = tl.where(i < end, p, 0.0).to(tl.float64)
            q = tl.where(i < end, q, 0.0).to(tl.float64)
            density += tl.where(i < end, part, 0.0)
            product *= tl.where(i < end, excess, 1.0).to(tl.float64)
            n0 += p
            n1 += q
            p *= u
            q *= w
            first0 += p
            first1 += q
            second0 += p * u
            second1 += q * w
        density += tl.log(product)
    return (
        tl.sum(n0, 0),
        tl.sum(n1, 0),
        tl.sum(first0, 0),
        tl.sum(first1, 0),
        tl.sum(second0, 0),
        tl.sum(second1, 0),
        tl.sum(density, 0),
    )


@triton.jit
def em_step(n0, n1, first0, first1, second0, second1, theta, added):
    """Returns the theta that follows, given the sums of EM at `theta`."""
    owned0 = n0 + TINY
    owned1 = n1 + TINY
    shift0 = first0 / owned0
    shift1 = first1 / owned1
    v0 = tl.maximum(second0 / owned0 - shift0 * shift0, 0.0) + added
    v1 = tl.maximum(second1 / owned1 - shift1 * shift1, 0.0) + added
    return pack(owned0 / owned1, element(theta, 1) + shift0, element(theta, 2) + shift1, v0, v1)


@triton.jit
def first_theta(count, n, first, second, mean, square, floor):
    """Returns theta for two parts of a group, and the floor of the variances. n, first, second: sums of the upper part.

    square: sum of the squared deviations from the mean over the whole group.
    """
    below = -first / (count - n)
    above = first / n
    added = floor * square / count
    v0 = tl.maximum((square - second) / (count - n) - below * below, 0.0) + added
    v1 = tl.maximum(second / n - above * above, 0.0) + added
    return pack((count - n) / n, mean + below, mean + above, v0, v1), added


@triton.jit
def extrapolation(theta, one, two, limit, tolerance):
    """Returns the extrapolated theta, its length, and whether the fit is done. limit: the largest length."""
    i = tl.arange(0, 8)
    r = one - theta
    v = two - one - r
    unit = tl.exp(-0.5 * tl.where(i == 1, element(theta, 3), tl.where(i == 2, element(theta, 4), 0.0)))
    step = tl.sqrt(tl.sum(r * unit * r * unit, 0))
    change = tl.sqrt(tl.sum(v * unit * v * unit, 0))
    reach = tl.where(change > 0, tl.maximum(step / change, 1.0), 1.0)
    done = step * reach < tolerance  # step / (1 - rate of convergence) estimates the distance
    reach = tl.minimum(reach, limit)
    return theta + 2 * reach * r + reach * reach * v, reach, done


@triton.jit
def next_limit(limit, reach, better):
    """Returns the largest length of the next extrapolation."""
    return tl.where(better, tl.where(reach == limit, 4 * limit, limit), tl.maximum(limit / 4, 1.0))


@triton.jit
def write_posteriors(
    x_ptr, sample_ptr, posterior_ptr, begin, end, low, scale, theta, fits, monotone, BLOCK: tl.constexpr
):
    """Writes the posteriors of the losses begin..end in the order of the samples. Returns their total log-density."""
    m0, half0, height0, m1, half1, height1 = gaussians(theta)
    lower = (m0 <= m1) | (fits == 0)  # whether component 0 has the lower mean
    turn = (m0 * half0 - m1 * half1) / (half0 - half1)  # turning point of the odds; it does not lie between the means
    lowest = tl.where(monotone & ((half0 > half1) == lower), turn, -1.0)
    highest = tl.where(monotone & ((half0 < half1) == lower), turn, 2.0)
    density = tl.zeros([BLOCK], tl.float64)
    for tile in range(begin, end, BLOCK):
        i = tile + tl.arange(0, BLOCK)
        z = scaled_losses(x_ptr, i, end, low, scale)
        p, q, part, excess = shares(z - m0, half0, height0, z - m1, half1, height1)
        density += tl.where(i < end, part + tl.log(excess.to(tl.float64)), 0.0)
        z = tl.minimum(tl.maximum(z, lowest), highest)
        p, q, part, excess = shares(z - m0, half0, height0, z - m1, half1, height1)
        to = tl.load(sample_ptr + i, mask=i < end, other=0)
        p = tl.where(lower, p, q)
        tl.store(posterior_ptr + to, tl.where(fits, p, 1.0), mask=i < end)
    return tl.sum(density, 0)


@triton.jit
def write_group(
    group, count, low, span, fits, theta, steps, density,
    weight_ptr, mean_ptr, variance_ptr, iterations_ptr, log_likelihood_ptr,
):  # fmt: skip
    """Writes the five results of a group, with the component of the lower mean first."""
    lower = (element(theta, 1) <= element(theta, 2)) | (fits == 0)
    nan = float("nan")
    one = tl.where(count > 0, 1.0, nan)
    point = tl.where(count > 0, low, nan)
    here = 2 * group + tl.where(lower, 0, 1)
    there = 2 * group + tl.where(lower, 1, 0)
    w0 = 1.0 / (1.0 + tl.exp(-element(theta, 0)))
    w1 = 1.0 / (1.0 + tl.exp(element(theta, 0)))
    v = span * span * tl.exp(theta)
    tl.store(weight_ptr + here, tl.where(fits, w0, one))
    tl.store(weight_ptr + there, tl.where(fits, w1, one - 1))
    tl.store(mean_ptr + here, tl.where(fits, low + span * element(theta, 1), point))
    tl.store(mean_ptr + there, tl.where(fits, low + span * element(theta, 2), point))
    tl.store(variance_ptr + here, tl.where(fits, element(v, 3), one - 1))
    tl.store(variance_ptr + there, tl.where(fits, element(v, 4), one - 1))
    tl.store(iterations_ptr + group, steps)
    total = density - count * (HALF_LOG_TWO_PI + tl.log(tl.where(fits, span, 1.0)))
    tl.store(log_likelihood_ptr + group, tl.where(fits, total, nan))
