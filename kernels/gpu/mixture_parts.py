"""`mixture` in Triton for large groups: several programs share the losses of a group.

A pass is one kernel. A program first adds up the sums that the pass before left for all parts of its group, in a fixed
order, and moves the group to its next phase. All programs of a group do this alike, each with its own copy of the
state, so they need not wait for each other. Then it writes the sums of its own part for that phase. The phases:

    EXTENT -> MEAN -> SQUARES -> CUT, up to MAX_CUTS times -> (ONE -> TWO -> FAR), until the fit is done -> DONE

They do what `_start` and `_fit` do in mixture.py. The host launches passes until all groups are done. To know that, it
waits for the device once in PASSES passes.
"""

# pyright: reportGeneralTypeIssues=false
# Triton declares no result for a jit function that calls another one, so its results cannot be unpacked for Pyright.

# Pyright reads a launch, kernel[grid](...), as a call of the function itself, which has no num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.gpu.launch_configs import launch_config
from tadperf.kernels.gpu.mixture_steps import (
    MAX_CUTS,
    SLACK,
    SMALLEST_PART,
    em_step,
    em_sums,
    extent,
    extrapolation,
    first_theta,
    next_limit,
    sums_above,
    write_group,
    write_posteriors,
)

PROGRAMS = 256  # two for each multiprocessor of an H100 or H200, as many as their registers allow; not tuned
PART = 2048  # a part has at least this many losses on average; not tuned
PASSES = 24  # between two reads of the phases by the host; not tuned

# A copy of the state of a group: 48 float64. First four vectors of 8, then numbers.
THETA, ONE_THETA, TWO_THETA, POINT = tl.constexpr(0), tl.constexpr(8), tl.constexpr(16), tl.constexpr(24)
PHASE, LOW, SPAN, MEAN_OF_GROUP = tl.constexpr(32), tl.constexpr(33), tl.constexpr(34), tl.constexpr(35)
SQUARE, CUT_AT, TRIED, CUTS_LEFT = tl.constexpr(36), tl.constexpr(37), tl.constexpr(38), tl.constexpr(39)
ABOVE, ADDED, LIMIT, STEPS = tl.constexpr(40), tl.constexpr(43), tl.constexpr(44), tl.constexpr(45)
BEFORE, REACH = tl.constexpr(46), tl.constexpr(47)
STATE = tl.constexpr(48)
EXTENT, MEAN, SQUARES, CUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
ONE, TWO, FAR, DONE = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)


@triton.jit
def bounds(begins_ptr, group, part, n_parts):
    """Returns where a part of a group begins and ends."""
    begin = tl.load(begins_ptr + group)
    end = tl.load(begins_ptr + group + 1)
    size = tl.cdiv(end - begin, n_parts)
    return tl.minimum(begin + part * size, end), tl.minimum(begin + (part + 1) * size, end)


@triton.jit
def scale_of(state):
    """Returns 1 / (highest - lowest loss) of a group, or 1 if all losses are equal."""
    span = tl.load(state + SPAN)
    return 1.0 / tl.where(span > 0, span, 1.0)


@triton.jit
def fold_start(state, phase, a, b, c, count, floor):
    """Moves a group in the phase MEAN, SQUARES or CUT to its next phase. a, b, c: the sums of `sums_above`."""
    mean = tl.load(state + MEAN_OF_GROUP)
    if phase == MEAN:
        tl.store(state + MEAN_OF_GROUP, b / count)
        tl.store(state + PHASE, SQUARES)
    elif phase == SQUARES:
        tl.store(state + SQUARE, c)
        tl.store(state + CUT_AT, float("nan"))  # differs from any cut
        tl.store(state + TRIED, mean)
        tl.store(state + CUTS_LEFT, MAX_CUTS + 1.0)
        tl.store(state + PHASE, CUT)
    else:
        tried, left = tl.load(state + TRIED), tl.load(state + CUTS_LEFT)
        n, first, second = tl.load(state + ABOVE), tl.load(state + ABOVE + 1), tl.load(state + ABOVE + 2)
        moves = (tl.minimum(a, count - a) * SMALLEST_PART >= count) & (tried != tl.load(state + CUT_AT))
        moves = moves | (left > MAX_CUTS)  # the first cut, at the mean
        n, first, second = tl.where(moves, a, n), tl.where(moves, b, first), tl.where(moves, c, second)
        if moves & (left > 1):
            tl.store(state + ABOVE, n)
            tl.store(state + ABOVE + 1, first)
            tl.store(state + ABOVE + 2, second)
            tl.store(state + CUT_AT, tried)
            tl.store(state + TRIED, mean + (first / n - first / (count - n)) / 2)
            tl.store(state + CUTS_LEFT, left - 1)
        else:
            theta, added = first_theta(count, n, first, second, mean, tl.load(state + SQUARE), floor)
            tl.store(state + THETA + tl.arange(0, 8), theta)
            tl.store(state + POINT + tl.arange(0, 8), theta)
            tl.store(state + ADDED, added)
            tl.store(state + LIMIT, 1.0)
            tl.store(state + STEPS, 0.0)
            tl.store(state + PHASE, ONE)


@triton.jit
def fold_step(state, phase, following, density, count, rounds, tolerance):
    """Moves a group in the phase ONE, TWO or FAR to its next phase. following: the theta after one step of EM."""
    i = tl.arange(0, 8)
    steps = tl.load(state + STEPS)
    if phase == ONE:
        tl.store(state + ONE_THETA + i, following)
        tl.store(state + POINT + i, following)
        tl.store(state + PHASE, TWO)
    elif phase == TWO:
        theta, one = tl.load(state + THETA + i), tl.load(state + ONE_THETA + i)
        far, reach, done = extrapolation(theta, one, following, tl.load(state + LIMIT), tolerance)
        tl.store(state + TWO_THETA + i, following)
        tl.store(state + BEFORE, density)
        tl.store(state + REACH, reach)
        tl.store(state + POINT + i, tl.where(done, following, far))
        tl.store(state + STEPS, steps + tl.where(done, 2.0, 0.0))
        tl.store(state + PHASE, tl.where(done, 7.0, 6.0))
    else:
        limit = tl.load(state + LIMIT)
        better = density >= tl.load(state + BEFORE) - SLACK * count
        theta = tl.where(better, following, tl.load(state + TWO_THETA + i))
        tl.store(state + LIMIT, next_limit(limit, tl.load(state + REACH), better))
        tl.store(state + THETA + i, theta)
        tl.store(state + POINT + i, theta)
        tl.store(state + STEPS, steps + 3)
        tl.store(state + PHASE, tl.where(steps + 3 >= 3 * rounds, 7.0, 4.0))


@triton.jit
def fold(state, sums, count, n_parts, rounds, tolerance, floor, PARTS: tl.constexpr):
    """Adds up the sums [n_parts, 8] of a group of `count` losses, and moves the group to its next phase."""
    phase = tl.load(state + PHASE)
    tl.debug_barrier()  # all threads of the program know the phase before one of them changes it
    part = tl.arange(0, PARTS)
    ptrs = sums + part * 8
    inside = part < n_parts
    a, b = tl.load(ptrs, inside, other=0.0), tl.load(ptrs + 1, inside, other=0.0)
    if phase == EXTENT:
        low = -tl.max(tl.where(inside, a, float("-inf")), 0)
        span = tl.max(tl.where(inside, b, float("-inf")), 0) - low
        fits = span > 0  # false if the group is empty (-inf) or all losses are equal
        tl.store(state + LOW, low)
        tl.store(state + SPAN, span)
        tl.store(state + TRIED, -1.0)
        tl.store(state + MEAN_OF_GROUP, 0.0)
        tl.store(state + STEPS, 0.0)
        tl.store(state + POINT + tl.arange(0, 8), tl.zeros([8], tl.float64))
        tl.store(state + PHASE, tl.where(fits, 1.0, 7.0))
    elif phase < ONE:
        c = tl.load(ptrs + 2, inside, other=0.0)
        fold_start(state, phase, tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), count, floor)
    elif phase < DONE:
        c, d = tl.load(ptrs + 2, inside, other=0.0), tl.load(ptrs + 3, inside, other=0.0)
        e, f = tl.load(ptrs + 4, inside, other=0.0), tl.load(ptrs + 5, inside, other=0.0)
        density = tl.sum(tl.load(ptrs + 6, inside, other=0.0), 0)
        point, added = tl.load(state + POINT + tl.arange(0, 8)), tl.load(state + ADDED)
        following = em_step(
            tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(d, 0), tl.sum(e, 0), tl.sum(f, 0), point, added
        )
        fold_step(state, phase, following, density, count, rounds, tolerance)


@triton.jit
def write_sums(x_ptr, begin, end, state, to, BLOCK: tl.constexpr):
    """Writes the sums of one part of a group for the phase of the group to 8 float64 at `to`."""
    phase = tl.load(state + PHASE)
    low, scale = tl.load(state + LOW), scale_of(state)
    if phase == EXTENT:
        lowest, highest = extent(x_ptr, begin, end, BLOCK)
        tl.store(to, -lowest)
        tl.store(to + 1, highest)
    elif phase < ONE:
        cut, centre = tl.load(state + TRIED), tl.load(state + MEAN_OF_GROUP)
        n, first, second = sums_above(x_ptr, begin, end, low, scale, cut, centre, BLOCK)
        tl.store(to, n)
        tl.store(to + 1, first)
        tl.store(to + 2, second)
    elif phase < DONE:
        theta = tl.load(state + POINT + tl.arange(0, 8))
        n0, n1, first0, first1, second0, second1, density = em_sums(x_ptr, begin, end, low, scale, theta, BLOCK)
        tl.store(to, n0)
        tl.store(to + 1, n1)
        tl.store(to + 2, first0)
        tl.store(to + 3, first1)
        tl.store(to + 4, second0)
        tl.store(to + 5, second1)
        tl.store(to + 6, density)


@triton.jit(do_not_specialize=["number", "rounds"])
def pass_kernel(
    x_ptr,
    begins_ptr,
    state_ptr,  # float64 [G, parts, STATE]
    sums_ptr,  # float64 [2, G, parts, 8]: those of the passes with even and with odd numbers
    n_parts,
    number,  # of this pass, from 0
    rounds,
    tolerance: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    floor: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Adds up the sums of the pass before, and writes those of one part of one group."""
    group, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    first = group * n_parts
    state = state_ptr + (first + part) * STATE
    size = tl.num_programs(1).to(tl.int64) * n_parts * 8
    if number > 0:
        count = (tl.load(begins_ptr + group + 1) - tl.load(begins_ptr + group)).to(tl.float64)
        before = sums_ptr + (number + 1) % 2 * size + first * 8
        fold(state, before, count, n_parts, rounds, tolerance, floor, PARTS)
        tl.debug_barrier()  # all threads of the program see its new state
    begin, end = bounds(begins_ptr, group, part, n_parts)
    write_sums(x_ptr, begin, end, state, sums_ptr + number % 2 * size + (first + part) * 8, BLOCK)


@triton.jit(do_not_specialize=["monotone"])
def write_kernel(
    x_ptr, sample_ptr, begins_ptr, state_ptr, sums_ptr, posterior_ptr, n_parts, monotone, BLOCK: tl.constexpr
):
    """Writes the posteriors of one part of one group, and its total log-density to sums [G, parts, 8]."""
    group, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    state = state_ptr + (group * n_parts + part) * STATE
    begin, end = bounds(begins_ptr, group, part, n_parts)
    theta = tl.load(state + POINT + tl.arange(0, 8))
    density = write_posteriors(
        x_ptr,
        sample_ptr,
        posterior_ptr,
        begin,
        end,
        tl.load(state + LOW),
        scale_of(state),
        theta,
        tl.load(state + SPAN) > 0,
        monotone != 0,
        BLOCK,
    )
    tl.store(sums_ptr + (group * n_parts + part) * 8, density)


@triton.jit
def result_kernel(
    begins_ptr,
    state_ptr,
    sums_ptr,
    weight_ptr,
    mean_ptr,
    variance_ptr,
    iterations_ptr,
    log_likelihood_ptr,
    n_parts,
    PARTS: tl.constexpr,
):
    """Writes the five results of one group."""
    group = tl.program_id(0).to(tl.int64)
    state = state_ptr + group * n_parts * STATE
    count = (tl.load(begins_ptr + group + 1) - tl.load(begins_ptr + group)).to(tl.float64)
    part = tl.arange(0, PARTS)
    density = tl.sum(tl.load(sums_ptr + (group * n_parts + part) * 8, part < n_parts, other=0.0), 0)
    span = tl.load(state + SPAN)
    write_group(
        group,
        count,
        tl.load(state + LOW),
        span,
        span > 0,
        tl.load(state + POINT + tl.arange(0, 8)),
        tl.load(state + STEPS).to(tl.int64),
        density,
        weight_ptr,
        mean_ptr,
        variance_ptr,
        iterations_ptr,
        log_likelihood_ptr,
    )


def fit_in_parts(
    x: Tensor,
    sample: Tensor,
    begins: Tensor,
    results: tuple[Tensor, ...],
    rounds: int,
    tolerance: float,
    floor: float,
    monotone: int,
) -> None:
    """Fills the six results [G] of `mixture` for losses x sorted by group. Waits for the device every PASSES passes."""
    groups = len(begins) - 1
    parts = max(1, min(PROGRAMS // groups, len(x) // (groups * PART)))
    state = x.new_zeros(groups, parts, STATE.value, dtype=torch.float64)
    sums = state.new_zeros(2, groups, parts, 8)
    padded = triton.next_power_of_2(parts)
    config: dict = launch_config("mixture_parts", x.device, len(x) // groups)
    longest = 3 + MAX_CUTS.value + 1 + 3 * rounds  # passes of a group that never converges
    for number in range(longest + 1):  # each pass adds up the sums of the one before
        pass_kernel[(parts, groups)](
            x, begins, state, sums, parts, number, rounds, tolerance, floor, PARTS=padded, **config
        )
        if number % PASSES == PASSES - 1 and bool((state[:, 0, PHASE.value] == DONE.value).all()):
            break
    posterior, *others = results
    write_kernel[(parts, groups)](x, sample, begins, state, sums, posterior, parts, monotone, **config)
    result_kernel[(groups,)](begins, state, sums, *others, parts, PARTS=padded, num_warps=4)
