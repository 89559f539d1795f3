"""Measures one iteration of trajectory matching: the published unroll, and the adjoint with each backend of its steps.

"published": MTT as its authors run it (Cazenavette et al., 2022): one graph over T steps by autograd, contiguous maps.
gradient_error: the relative error of the images' gradient against the same unroll in float64 (against the adjoint in
float32 if that would not fit). compile_s and warm_s: seconds from the start of a process to the end of its first
iteration, without and with the compiler's caches of an earlier process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.bench.operators import engine
from tadperf.bench.operators.engine import Row
from tadperf.bench.stages import runner
from tadperf.compute.compile import save_compile_cache
from tadperf.compute.torch_settings import torch_settings
from tadperf.config import MatchConfig, NetConfig
from tadperf.data import augment
from tadperf.matching import cuda_graph_sweep, gradient, step_backends
from tadperf.matching.gradient import Step
from tadperf.matching.trajectories import draw_steps
from tadperf.nets.architectures import Shape, build
from tadperf.nets.flat import FlatNet

AUGMENT = "color_crop_cutout_flip_scale_rotate"
FAMILIES = {
    "tadperf": "tadperf",
    "tadperf bfloat16": "tadperf",
    "tadperf compiled": "inductor",
    "autograd": "eager",
    "published": "published",
}
MAX_UNROLLED = 10  # inner steps; up to this number the true gradient is an unroll in float64


class Case(NamedTuple):
    """The shapes of a matching problem with 10 classes and hard labels."""

    shape: Shape
    batch: int
    steps: int
    net: NetConfig
    providers: Sequence[str] = tuple(FAMILIES)
    ipc: int = 10


def _cifar10(steps: int, *providers: str, **net: object) -> Case:
    config = NetConfig.model_validate({"width": 128, "depth": 3, **net})
    return Case((3, 32, 32), 100, steps, config, providers or tuple(FAMILIES))


def _network(**net: object) -> Case:
    """Returns a case whose network has no formulas in tadperf: autograd, eager and compiled, one step of 20 images."""
    return _cifar10(1, "autograd", "tadperf compiled", **net)._replace(batch=20)


SIZES = {
    "digits": Case((1, 8, 8), 50, 10, NetConfig.model_validate({"width": 32, "depth": 2})),
    "cifar10": _cifar10(3),  # all T steps take the same time, so three are enough
    "cifar10-t10": _cifar10(10, "tadperf", "autograd", "published"),
    "cifar10-t30": _cifar10(30, "tadperf", "tadperf bfloat16", "published"),
    "cifar10-t80": _cifar10(80, "tadperf"),
    "cifar10-ipc10": _cifar10(30),  # for a GPU
    "cifar10-ipc50": _cifar10(30)._replace(batch=256, ipc=50),
    "group": _network(norm="group"),
    "none": _network(norm="none"),
    "alexnet": _network(name="alexnet"),
    "vgg11": _network(name="vgg11"),
    "resnet18": _network(name="resnet18"),
}
DEFAULT_SIZES = ("digits", "cifar10")


class MatchingProblem(NamedTuple):
    """The arguments of `gradient.adjoint`."""

    net: FlatNet
    start: Tensor
    target: Tensor
    images: Tensor
    labels: Tensor
    lr: Tensor
    steps: Sequence[Step]


def make_problem(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> MatchingProblem:
    """Returns random images and an expert that moves by a random step: the same in every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    module = build(case.net, case.shape, 10, 0).to(device, dtype)
    net = FlatNet(module)
    start = net.flatten()
    step = torch.randn(start.shape, generator=generator).to(start)
    count = 10 * case.ipc
    images = torch.randn(count, *case.shape, generator=generator).to(start)
    config = MatchConfig.model_validate({"steps": case.steps, "batch": case.batch})
    steps = draw_steps(config, count, case.shape[-1], AUGMENT, generator).to(device).split()
    labels = torch.arange(10, device=device).repeat_interleave(case.ipc)
    return MatchingProblem(net, start, start + 0.01 * step, images, labels, torch.tensor(0.01).to(start), steps)


def convnet(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """Returns the logits of the ConvNet with instance norm.

    parameters: weight and bias of convolution and norm for each block, then of the classifier.
    """
    *blocks, weight, bias = parameters
    for i in range(0, len(blocks), 4):
        kernel, kernel_bias, norm_weight, norm_bias = blocks[i : i + 4]
        x = F.conv2d(x, kernel, kernel_bias, padding=1)
        x = F.avg_pool2d(F.relu(F.group_norm(x, len(norm_weight), norm_weight, norm_bias)), 2)
    return F.linear(x.flatten(1), weight, bias)


def published(p: MatchingProblem) -> Tensor:
    """Returns the images' gradient as MTT computes it, with the same augmentation as all other providers."""
    x, lr = p.images.detach().requires_grad_(), p.lr.detach().requires_grad_()
    theta = p.start.detach().requires_grad_()
    for index, drawn in p.steps:
        assert isinstance(drawn, augment.Draw)
        logits = convnet(list(p.net.views(theta).values()), augment.apply(x[index], drawn))
        loss = F.cross_entropy(logits, p.labels[index])
        (g,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - lr * g
    loss = (theta - p.target).square().sum() / (p.start - p.target).square().sum()
    return torch.autograd.grad(loss, [x, lr])[0]


def adjoint(p: MatchingProblem, backend: step_backends.StepBackend) -> Tensor:
    """Returns the images' gradient as tadperf computes it."""
    return gradient.adjoint(*p, backend=backend).images


def iteration(provider: str, p: MatchingProblem) -> Callable[[], Tensor]:
    """Returns a function that runs one iteration; its first call compiles.

    "tadperf" is what a run with match.compile = auto uses for the ConvNet: the formulas, on CUDA in one CUDA graph.
    """
    if provider == "published":
        return partial(published, p)
    if provider == "tadperf" and p.images.is_cuda:
        sweep = cuda_graph_sweep.GraphedSweep(p.net, step_backends.eager(p.net))
        drawn = gradient.StepDraws.join(p.steps)
        return lambda: sweep(*p[1:-1], drawn).images
    backend = {
        "autograd": step_backends.autograd,
        "tadperf": step_backends.eager,
        "tadperf bfloat16": partial(step_backends.eager, precision=torch.bfloat16),
        "tadperf compiled": step_backends.compiled,
    }[provider](p.net)
    return partial(adjoint, p, backend)


def single_call(size: str, provider: str, device: torch.device) -> Callable[[], Tensor]:
    return iteration(provider, make_problem(SIZES[size], device))


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def true_gradient(case: Case, device: torch.device) -> Tensor:
    """Returns the images' gradient by unroll, or by autograd's adjoint if a graph of T steps would not fit."""
    dtype = torch.float64 if case.steps <= MAX_UNROLLED else torch.float32
    p = make_problem(case, device, dtype)
    with torch_settings(tf32=False):
        if case.steps <= MAX_UNROLLED:
            return gradient.unroll(*p).images
        return adjoint(p, step_backends.autograd(p.net))


@torch_settings(tf32=True)  # the default of a run
def measure(size: str, device: torch.device, repeats: int) -> list[Row]:
    """Returns a row for each provider, tadperf's first."""
    case = SIZES[size]
    torch.compiler.reset()
    p, truth = make_problem(case, device), true_gradient(case, device)
    calls = {name: _synchronised(iteration(name, p), device) for name in case.providers}
    errors = {name: relative_error(function(), truth) for name, function in calls.items()}
    times = engine.interleaved(calls, repeats)
    rows = []
    for name in case.providers:
        compiled = FAMILIES[name] == "inductor"
        cold, warm = first_iterations(size, device) if compiled else (None, None)
        rows.append(
            runner.make_row(
                "matching",
                size,
                name,
                FAMILIES[name],
                times[name],
                gradient_error=errors[name],
                compile_s=cold,
                warm_s=warm,
                peak_mb=None if compiled else runner.peak_memory("matching", size, name, device),
                note=f"T = {case.steps}, batch {case.batch}",
            )
        )
    return rows


def _synchronised(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    def run() -> Tensor:
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result

    return run


def first_iterations(size: str, device: torch.device) -> tuple[float, float]:
    """Returns the seconds from the start of a process to the end of its first compiled iteration: cold and warm."""
    command = [sys.executable, "-m", "tadperf.bench.stages.matching", size, str(device)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # it would replace the cache folder
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in ("cold", "warm"):
            start = time.perf_counter()
            subprocess.run(command, env=environment | {"XDG_CACHE_HOME": cache}, check=True, stdout=subprocess.PIPE)
            seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1]


def main(size: str, device_name: str) -> None:
    """Runs the first compiled iteration of this process, with the compiler's cache; saves what it has compiled."""
    device = torch.device(device_name)
    p = make_problem(SIZES[size], device)
    backend = step_backends.compiled(p.net)
    adjoint(p, backend)
    if backend.cache:
        save_compile_cache(backend.cache)


if __name__ == "__main__":
    main(*sys.argv[1:])
