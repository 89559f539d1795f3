"""Fuzzes the compiled operators with random shapes, strides, values, types and threads, on every instruction set.

python tests/kernels/fuzz_operators.py [--cases 200] [--seed 0] [--operators per_sample,mixture]

Half of the cases have moderate values: results must agree with the reference in float64. The others have NaN,
infinities, denormal and huge numbers: the operator must return, and a sanitizer build must stay silent (.ci/sanitize).
Every case must give the same bits for one thread and for several. Prints a line for each operator and instruction set.
Returns exit code 1 if a case failed, and prints its seed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from random import Random

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads would compete for the cores

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from tadperf import kernels
from tadperf.kernels import native
from tadperf.kernels.ops.conv3x3 import conv3x3, conv3x3_kernel
from tadperf.kernels.ops.norm_relu_pool_dual import (
    Affine,
    Dual,
    norm_relu_pool_dual,
    norm_relu_pool_dual_gradient,
    norm_relu_pool_dual_gradient_reference,
    norm_relu_pool_dual_reference,
)

TYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-40, 6e-8, 3e-5, 65519.0, 65520.0, 3e38, -3e38, 1e30)


class Case:
    """Random inputs of one case. moderate: values for which the reference is exact enough to compare."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.moderate = self.random.random() < 0.5
        self.dtype = self.random.choice(TYPES)
        self.threads = self.random.randint(2, 5)

    def size(self, most: int, least: int = 0) -> int:
        """Returns a size from `least` to `most`; small sizes and neighbours of multiples of 16 are frequent."""
        kind = self.random.randrange(3)
        if kind == 0:
            size = self.random.randint(least, min(most, least + 5))
        elif kind == 1:
            size = 16 * self.random.randint(0, most // 16) + self.random.randint(-1, 1)
        else:
            size = self.random.randint(least, most)
        return min(max(size, least), most)

    def floats(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Returns normal values with random strides. Unless the case is moderate, some are special values."""
        values = torch.randn(shape, generator=self.generator) * scale
        if not self.moderate and values.numel():
            flat = values.view(-1)
            for _ in range(self.random.randint(1, 4)):
                flat[self.random.randrange(flat.numel())] = self.random.choice(SPECIAL)
            if self.random.random() < 0.3:
                values = values * self.random.choice((1e-42, 1e-20, 1e18, 1e38))
        return self.strided(values.to(dtype or self.dtype))

    def strided(self, x: Tensor) -> Tensor:
        """Returns x with other strides: as it is, a part of a larger tensor, transposed, or one row for all."""
        kind = self.random.randrange(4)
        if kind == 1 and x.ndim:
            wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + self.random.randint(1, 3))
            wide[..., 1 : x.shape[-1] + 1] = x
            return wide[..., 1 : x.shape[-1] + 1]
        if kind == 2 and x.ndim == 2:
            return x.t().contiguous().t()
        if kind == 3 and x.ndim == 1 and len(x):
            return x.repeat_interleave(2)[::2]
        return x

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        dtype = self.random.choice((torch.int32, torch.int64))
        return self.strided(torch.randint(low, high, shape, generator=self.generator).to(dtype))


def tensors(results: Iterable[object]) -> list[Tensor]:
    """Returns all tensors in nested tuples."""
    flat: list[Tensor] = []
    for result in results:
        flat += [result] if isinstance(result, Tensor) else tensors(result) if isinstance(result, tuple) else []
    return flat


def run(case: Case, operator: Callable[[], object]) -> list[Tensor]:
    """Returns the results with one thread. Asserts that several threads give the same bits."""
    torch.set_num_threads(1)
    alone = tensors((operator(),))
    torch.set_num_threads(case.threads)
    together = tensors((operator(),))
    torch.set_num_threads(1)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"bits by threads: {m}")
    return alone


def close(case: Case, actual: Tensor, expected: Tensor, relative: float, absolute: float, name: str) -> None:
    """Compares a moderate case with the reference; both tolerances grow with the rounding of the result's type."""
    if not case.moderate:
        return
    if not actual.is_floating_point():
        assert torch.equal(actual, expected), name
        return
    absolute += ROUNDING[actual.dtype] * (float(expected.abs().nan_to_num(0).max()) if expected.numel() else 0)
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=relative, atol=absolute, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def mostly_close(case: Case, actual: Tensor, expected: Tensor, limit: float, name: str) -> None:
    """Compares 98 % of the elements: rounding decides whether ReLU passes the gradient of a pixel near 0."""
    if not case.moderate:
        return
    assert actual.isfinite().all(), name
    error = (actual.double() - expected).abs()
    far = error > limit * (1 + expected.abs().max()) if expected.numel() else error > 0
    assert far.double().mean() <= 0.02 or far.numel() < 50, name


def per_sample(case: Case) -> None:
    rows, classes = case.size(700), case.size(300, 2)
    logits, labels = case.floats(rows, classes, scale=4), case.integers(-1, classes, rows)
    results = run(case, lambda: kernels.per_sample(logits, labels))
    expected = kernels.per_sample_reference(logits.double(), labels)
    for name, actual, wanted in zip(kernels.PerSample._fields, results, expected, strict=True):
        close(case, actual, wanted, 2e-6, 2e-6, name)
    leaf = logits.detach().requires_grad_()
    [gradient] = run(case, lambda: torch.autograd.grad(kernels.per_sample(leaf, labels).loss.sum(), leaf))
    wide = logits.double().requires_grad_()
    [wanted] = torch.autograd.grad(kernels.per_sample_reference(wide, labels).loss.sum(), wide)
    close(case, gradient, wanted, 2e-6, 2e-6, "gradient")


def per_sample_linear(case: Case) -> None:
    rows, size, classes = case.size(200), case.size(70, 1), case.size(150, 2)
    inputs = case.floats(rows, size), case.floats(classes, size, scale=0.3)
    labels = case.integers(-1, classes, rows)
    bias = case.random.choice((None, case.floats(classes)))
    results = run(case, lambda: kernels.per_sample_linear(*inputs, labels, bias))
    features, weight = inputs[0].double(), inputs[1].double()
    expected = kernels.per_sample_linear_reference(features, weight, labels, None if bias is None else bias.double())
    top_two = expected.margin > 1e-4  # if two classes are closer, rounding may choose either
    for name, actual, wanted in zip(kernels.PerSample._fields, results, expected, strict=True):
        if name == "prediction":
            actual, wanted = actual[top_two], wanted[top_two]
        close(case, actual, wanted, 2e-4, 2e-4, name)


def images(case: Case, *shape: int) -> Tensor:
    x = case.floats(*shape) + (case.random.choice((0.0, 3.0)) if case.moderate else 0)
    return x.contiguous(memory_format=case.random.choice((torch.channels_last, torch.contiguous_format)))


def norm_relu_pool(case: Case) -> None:
    pool = case.random.random() < 0.5
    shape = case.size(5), case.size(70, 1), case.size(34, 2), case.random.choice((case.size(34, 2), 32, 64))
    x, weight, bias = images(case, *shape), case.floats(shape[1]).float(), case.floats(shape[1]).float()
    leaves = x.detach().requires_grad_(), weight.detach().requires_grad_(), bias.detach().requires_grad_()
    [y] = run(case, lambda: kernels.norm_relu_pool(x, weight, bias, pool=pool))
    grad = images(case, *y.shape)
    gradients = run(case, lambda: torch.autograd.grad(kernels.norm_relu_pool(*leaves, pool=pool), leaves, grad))
    if not case.moderate:
        is_finite = x.double().isfinite().flatten(2).all(-1)
        is_nan = y.isnan().flatten(2).all(-1)
        assert (is_finite | is_nan).all(), "a plane with a value that is not finite must be NaN"
        return
    wide = x.double().requires_grad_(), weight.double().requires_grad_(), bias.double().requires_grad_()
    expected = kernels.norm_relu_pool_reference(*wide, pool=pool)
    close(case, y, expected, 0, 2e-5, "y")
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        mostly_close(case, actual, wanted, 1e-4 + 2 * ROUNDING[actual.dtype], "gradients")


def norm_relu_pool_dual_case(case: Case) -> None:
    case.dtype = torch.float32
    pool = case.random.random() < 0.5
    shape = case.size(4), case.size(50, 1), case.size(20, 2), case.size(20, 2)
    x = Dual(*(case.floats(*shape).contiguous(memory_format=torch.channels_last) for _ in range(2)))
    affine = Affine(*(case.floats(shape[1]).contiguous() for _ in range(4)))
    y, y_dot, moments = run(case, lambda: norm_relu_pool_dual(x, affine, 1e-5, pool))
    wide_x, wide_affine = Dual(*(t.double() for t in x)), Affine(*(t.double() for t in affine))
    (wanted, wanted_dot), wanted_moments = norm_relu_pool_dual_reference(wide_x, wide_affine, 1e-5, pool)
    close(case, y, wanted, 0, 2e-5, "y")
    mostly_close(case, y_dot, wanted_dot, 1e-3, "tangent of y")
    if shape[2] * shape[3] > 8:  # in a plane of few pixels rstd may be large, and so may its rounding
        close(case, moments, wanted_moments, 1e-4, 1e-4, "moments")
    grad = Dual(*(case.floats(*y.shape) for _ in range(2)))
    results = run(case, lambda: norm_relu_pool_dual_gradient(grad, x, affine, moments, pool))
    wide_grad = Dual(*(t.double() for t in grad))
    expected = norm_relu_pool_dual_gradient_reference(wide_grad, wide_x, wide_affine, moments.double(), pool)
    for actual, wanted in zip(results, tensors(expected), strict=True):
        mostly_close(case, actual, wanted, 1e-3, "gradients")


def conv(case: Case) -> None:
    case.dtype = torch.float32
    channels = [16 * case.random.randint(2, 4) for _ in range(2)]
    shape = case.size(6, 1), channels[0], case.size(19, 1), case.size(19, 1)
    x = images(case, *shape)
    kernel = case.floats(channels[1], channels[0], 3, 3, scale=0.1)
    [y] = run(case, lambda: conv3x3(x, kernel))
    close(case, y, torch.conv2d(x.double(), kernel.double(), padding=1), 0, 1e-4, "y")
    grad = images(case, *y.shape)
    [of_kernel] = run(case, lambda: conv3x3_kernel(grad, x))
    wanted = conv2d_weight(x.double(), list(kernel.shape), grad.double(), padding=1)
    close(case, of_kernel, wanted, 0, 1e-3, "gradient of the kernel")


def reliability(case: Case) -> None:
    rows, size, classes = case.size(300), case.size(80, 1), case.size(40, 1)
    features, anchors = case.floats(rows, size), case.floats(classes, size, dtype=torch.float32)
    factor = torch.randn(size, size, generator=case.generator).tril_(-1) * 0.2 / math.sqrt(size)
    factor += torch.diag(0.5 + torch.rand(size, generator=case.generator))
    results = kernels.Reliability(*run(case, lambda: kernels.reliability(features, anchors, factor)))
    if not case.moderate:
        return
    expected = kernels.reliability_reference(features.double(), anchors.double(), factor.double())
    for name in ("distance", "second_distance", "similarity", "second_similarity"):
        close(case, getattr(results, name), getattr(expected, name), 2e-4, 2e-4, name)
    for first, second, index in (
        ("distance", "second_distance", "nearest"),
        ("similarity", "second_similarity", "most_similar"),
    ):
        apart = (getattr(expected, first) - getattr(expected, second)).abs() > 1e-3
        assert torch.equal(getattr(results, index)[apart], getattr(expected, index)[apart]), index


def trajectory_distance(case: Case) -> None:
    rows, size = case.random.choice((0, 1, case.size(6))), case.size(3000)
    student, target, start = (case.floats(rows if case.random.random() < 0.7 else 1, size) for _ in range(3))
    inputs = student, target, start
    cuts = sorted(case.random.randint(0, size) for _ in range(case.random.randint(0, 5)))
    segments = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    segments = case.random.choice((None, segments))
    results = run(case, lambda: kernels.trajectory_distance(*inputs, segments))
    wide = tuple(x.double().requires_grad_() for x in inputs)
    expected = kernels.trajectory_distance_reference(wide[0], wide[1], wide[2], segments)
    for name, actual, wanted in zip(kernels.TrajectoryDistance._fields, results, expected, strict=True):
        close(case, actual, wanted.detach(), 2e-5, 1e-6, name)
    leaves = tuple(x.detach().requires_grad_() for x in inputs)

    def gradient() -> tuple[torch.Tensor, ...]:
        distance, expert_distance, _ = kernels.trajectory_distance(leaves[0], leaves[1], leaves[2], segments)
        return torch.autograd.grad(distance.sum() + expert_distance.sum(), leaves)

    gradients = run(case, gradient)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected[0].sum() + expected[1].sum(), wide), strict=True):
        close(case, actual, wanted, 2e-5, 1e-5, "gradient")


def mixture(case: Case) -> None:
    samples, groups = case.size(5000), case.size(12, 1)
    index = case.integers(-1, groups, samples)
    losses = case.floats(samples).abs()
    if case.moderate:  # two components with some distance: the fit is then well conditioned
        losses = case.strided(
            (losses.float() * 0.3 + 4 * (torch.rand(samples, generator=case.generator) < 0.4)).to(case.dtype)
        )
    monotone = case.random.random() < 0.5
    results = kernels.Mixture(*run(case, lambda: kernels.mixture(losses, index, groups, monotone=monotone)))
    enough = torch.bincount(index[index >= 0].long(), minlength=groups) >= 30
    if not case.moderate or not enough.any():
        return
    expected = kernels.mixture_reference(losses, index, groups, monotone=monotone)
    for name in ("weight", "mean", "variance"):
        close(case, getattr(results, name)[enough], getattr(expected, name)[enough], 1e-4, 1e-5, name)
    used = (index >= 0) & enough[index.clamp(min=0).long()]
    close(case, results.posterior[used], expected.posterior[used].double(), 0, 1e-4, "posterior")


def diverse_pick(case: Case) -> None:
    count, choices, size, held = case.size(25), case.size(8), case.size(60, 1), case.size(25)
    candidates, qualified = case.floats(count, choices, size), case.floats(held, size)
    scores = torch.randn(count, choices, generator=case.generator).double()
    classes, held_classes = case.integers(0, 3, count), case.integers(0, 3, held)
    options = {"top_k": case.random.choice((None, 1, 3)), "weight": case.random.choice((None, 0.0, 0.7))}
    inputs = candidates, scores, qualified, classes, held_classes
    index, similarity = run(case, lambda: kernels.diverse_pick(*inputs, **options))
    if not case.moderate:
        return
    expected = kernels.diverse_pick_reference(*inputs, **options)
    for label in range(3):
        mine = (classes == label).nonzero()[:, 0]
        other = (index[mine] != expected.index[mine]).nonzero()[:, 0]
        same = mine[: int(other[0])] if len(other) else mine  # after a tie the choices differ
        close(case, similarity[same], expected.similarity[same].double(), 0, 1e-5, "similarity")
        if len(other) and size > 2:
            tie = mine[other[0]]
            assert abs(float(similarity[tie] - expected.similarity[tie])) < 1e-5 or options["weight"], "choice"


OPERATORS: dict[str, Callable[[Case], None]] = {
    "conv3x3": conv,
    "diverse_pick": diverse_pick,
    "mixture": mixture,
    "norm_relu_pool": norm_relu_pool,
    "norm_relu_pool_dual": norm_relu_pool_dual_case,
    "per_sample": per_sample,
    "per_sample_linear": per_sample_linear,
    "reliability": reliability,
    "trajectory_distance": trajectory_distance,
}


def failure(name: str, seed: int) -> str:
    """Runs one case. Returns the traceback of a failure, or an empty string."""
    try:
        OPERATORS[name](Case(seed))
    except Exception:
        return traceback.format_exc()
    return ""


def use(isa: str) -> None:
    os.environ["TADPERF_ISA"] = isa
    native.isa_index.cache_clear()
    assert native.isa() == isa


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=200, help="for each operator and instruction set")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; case i has seed + i")
    parser.add_argument("--operators", default=",".join(OPERATORS), help="separated by commas")
    options = parser.parse_args()
    module = native.module()
    if module is None:
        print(native.reason(), file=sys.stderr)
        return 2
    failures = total = 0
    for isa in module.isas():
        use(isa)
        for name in options.operators.split(","):
            seeds = range(options.seed, options.seed + options.cases)
            failed = {seed: text for seed in seeds if (text := failure(name, seed))}
            for seed, text in list(failed.items())[:3]:
                print(f"{isa} {name} seed {seed}:\n{text[-1500:]}", file=sys.stderr)
            print(f"{isa:9} {name:20} {options.cases} cases, {len(failed)} failed {list(failed)[:10]}", flush=True)
            failures, total = failures + len(failed), total + options.cases
    print(f"{total} cases, {failures} failed; threads: {module.thread_pool()}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
