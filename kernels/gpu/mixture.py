"""`mixture` in Triton: sorts the samples by group, then one program does the whole fit of one group.

The losses of a group stay in the caches of the multiprocessor, which reads them dozens of times. Groups that are large
for one program are fitted by several (mixture_parts.py). Samples with a group out of range are ignored, because
reporting them would mean waiting for the device.
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

from tadperf.kernels.gpu import on_device
from tadperf.kernels.gpu.launch_configs import launch_config
from tadperf.kernels.gpu.mixture_parts import fit_in_parts
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

# A pass of one program over this many losses takes longer than the launch of a pass in parts. Estimated for an H100: 20
# float64 operations a loss, 64 in a clock of 1.7 GHz, and 3 us a launch. Not tuned.
ONE_PROGRAM = 2**14


@triton.jit
def _step(x_ptr, begin, end, low, scale, added, theta, BLOCK: tl.constexpr):
    """Takes one step of EM. Returns the next theta, and the total log-density at the current one."""
    n0, n1, first0, first1, second0, second1, density = em_sums(x_ptr, begin, end, low, scale, theta, BLOCK)
    return em_step(n0, n1, first0, first1, second0, second1, theta, added), density


@triton.jit
def _start(x_ptr, begin, end, low, scale, floor, BLOCK: tl.constexpr):
    """Cuts the group in two parts. Returns theta, and the floor of the variances."""
    count = (end - begin).to(tl.float64)
    n, total, square = sums_above(x_ptr, begin, end, low, scale, -1.0, 0.0, BLOCK)
    mean = total / count
    n, first, square = sums_above(x_ptr, begin, end, low, scale, -1.0, mean, BLOCK)
    cut = mean
    n, first, second = sums_above(x_ptr, begin, end, low, scale, cut, mean, BLOCK)
    left = tl.full([], MAX_CUTS, tl.int32)
    while left > 0:
        following = mean + (first / n - first / (count - n)) / 2
        found, found_first, found_second = sums_above(x_ptr, begin, end, low, scale, following, mean, BLOCK)
        moves = (tl.minimum(found, count - found) * SMALLEST_PART >= count) & (following != cut)
        cut = tl.where(moves, following, cut)
        n = tl.where(moves, found, n)
        first = tl.where(moves, found_first, first)
        second = tl.where(moves, found_second, second)
        left = tl.where(moves, left - 1, 0)
    return first_theta(count, n, first, second, mean, square, floor)


@triton.jit
def _fit(x_ptr, begin, end, low, scale, floor, rounds, tolerance, BLOCK: tl.constexpr):
    """Runs EM in rounds of three steps and extrapolates each third step. Returns theta and the number of steps."""
    theta, added = _start(x_ptr, begin, end, low, scale, floor, BLOCK)
    slack = SLACK * (end - begin).to(tl.float64)
    limit = tl.full([], 1.0, tl.float64)  # the longest extrapolation; 1 is a plain step
    steps = tl.full([], 0, tl.int64)
    left = rounds
    while left > 0:
        one, before = _step(x_ptr, begin, end, low, scale, added, theta, BLOCK)
        two, before = _step(x_ptr, begin, end, low, scale, added, one, BLOCK)
        far, reach, done = extrapolation(theta, one, two, limit, tolerance)
        three, after = _step(x_ptr, begin, end, low, scale, added, far, BLOCK)
        better = after >= before - slack
        limit = next_limit(limit, reach, better)
        theta = tl.where(better & (done == 0), three, two)
        steps += tl.where(done, 2, 3)
        left = tl.where(done, 0, left - 1)
    return theta, steps


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
    low, high = extent(x_ptr, begin, end, BLOCK)
    span = high - low
    fits = span > 0  # false if the group is empty (-inf) or all losses are equal
    scale = 1.0 / tl.where(fits, span, 1.0)
    theta, steps = _fit(x_ptr, begin, end, low, scale, floor, tl.where(fits, rounds, 0), tolerance, BLOCK)
    density = write_posteriors(
        x_ptr, sample_ptr, posterior_ptr, begin, end, low, scale, theta, fits, monotone != 0, BLOCK
    )
    write_group(
        group, (end - begin).to(tl.float64), low, span, fits, theta, steps, density,
        weight_ptr, mean_ptr, variance_ptr, iterations_ptr, log_likelihood_ptr,
    )  # fmt: skip


def mixture(
    losses: Tensor, groups: Tensor, num_groups: int, iterations: int, tolerance: float, floor: float, monotone: bool
) -> tuple[Tensor, ...]:
    """Returns the six results of `mixture` for checked losses and groups [N].

    Waits for the device only if a group has more than ONE_PROGRAM losses on average.
    """
    used = losses.isfinite() & (groups >= 0) & (groups < num_groups)
    keys, sample = torch.where(used, groups, num_groups).int().sort(stable=True)
    begins = torch.searchsorted(keys, torch.arange(num_groups + 1, device=keys.device, dtype=torch.int32))
    posterior = torch.full_like(losses, torch.nan, dtype=torch.float32)
    in_range = (groups >= 0) & (groups < num_groups)
    posterior.masked_fill_(in_range & (losses < 0), 1.0).masked_fill_(in_range & (losses > 0), 0.0)
    weight, mean, variance = (losses.new_empty(num_groups, 2, dtype=torch.float64) for _ in range(3))
    steps, total = (losses.new_empty(num_groups, dtype=dtype) for dtype in (torch.int64, torch.float64))
    results = posterior, weight, mean, variance, steps, total
    size = len(losses) // num_groups
    sorted_losses = losses.float()[sample]
    options = iterations // 3, tolerance, floor, int(monotone)
    with on_device(losses):
        if size > ONE_PROGRAM:
            fit_in_parts(sorted_losses, sample, begins, results, *options)
        else:
            config: dict = launch_config("mixture", losses.device, size)
            mixture_kernel[(num_groups,)](sorted_losses, sample, begins, *results, *options, **config)
    return results
