"""Short timed runs of the real training, matching and neighbour search, for the estimate of a job.

Each probe runs the code of the job on images of the job's shape and stops it by an exception after its time.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tadperf.compute.torch_settings import torch_settings
from tadperf.compute.work_progress import TRAINED, counting, work
from tadperf.compute.workers import run_parallel, threads_for
from tadperf.config import NetConfig
from tadperf.data.normalise import DECOMPOSITION, normalise_work
from tadperf.experts.store import ResidentExperts
from tadperf.matching.base import MatchProblem
from tadperf.matching.bases import BASES
from tadperf.matching.loop import launch_iteration
from tadperf.matching.state import initial_state
from tadperf.nets import training
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.nets.problem import Problem
from tadperf.nets.students import Examples
from tadperf.nets.training import Recipe
from tadperf.task.task import Task
from tadperf.trust.neighbours import estimate_from_neighbours
from tadperf.trust.proxies import train_proxy
from tadperf.trust.state import TrustedView

WARM_UP_BATCHES, WARM_UP_SECONDS = 3, 1.0  # before the clock starts; seconds on CUDA only, where graphs are recorded
ENDLESS = 10**6  # epochs of a probe: its time ends first
STEP_BUDGET = 2.5  # seconds for the longer of the two timed iterations of matching; not tuned
CPU_BATCH = 64  # synthetic images of a timed inner step on a CPU; its time is proportional to them


class ProbeOverError(Exception):
    """Stops the training of a probe."""


def synchronise(device: torch.device) -> None:
    """Waits for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_image(run: Callable[[], object], device: torch.device, seconds: float, unit: int = TRAINED) -> float:
    """Runs a training for some seconds after its warm-up, and returns the seconds for one image.

    unit: TRAINED or TESTED, the units of work of one image (`work_progress`).
    """
    first = start = time.perf_counter()
    batches = before = units = 0

    def count(added: int) -> None:
        nonlocal start, batches, before, units
        batches, units = batches + 1, units + added
        now = time.perf_counter()
        is_warm = batches > WARM_UP_BATCHES and (device.type == "cpu" or now - first > WARM_UP_SECONDS)
        if not is_warm:
            synchronise(device)
            start, before = time.perf_counter(), units
        elif now - start > seconds:
            raise ProbeOverError

    with counting(count), contextlib.suppress(ProbeOverError):
        run()
    synchronise(device)
    end = time.perf_counter()
    if units == before:  # the training ended within the warm-up
        start, before = first, 0
    return (end - start) / max(1, units - before) * unit


def side_by_side(probe: Callable[[], float], workers: int) -> float:
    """Returns the mean result of a probe that runs in `workers` processes at the same time, as the tasks of the job."""
    results = [value for _, value in run_parallel(lambda _: probe(), range(workers), workers)]
    return sum(results) / len(results)


def proxy_seconds(problem: Problem, task: Task, seconds: float) -> float:
    """Returns the seconds for one image in the training of a proxy."""
    count = len(problem.images)
    view = TrustedView(torch.arange(count), problem.labels, torch.ones(count))
    config = task.config.trust.model_copy(update={"epochs": ENDLESS})
    run = partial(train_proxy, problem, view, torch.arange(count), config)
    return seconds_per_image(run, task.device, seconds)


def training_seconds(problem: Problem, net: NetConfig, recipe: Recipe, precision: torch.dtype, seconds: float) -> float:
    """Returns the seconds for one image in `training.fit` with this recipe."""
    module = build(net, problem.shape, problem.num_classes, 0).to(problem.device)
    endless = recipe._replace(epochs=ENDLESS)
    run = partial(
        training.fit, module, problem.images, problem.labels, endless, 0, weights=problem.weights, precision=precision
    )
    return seconds_per_image(run, problem.device, seconds)


def testing_seconds(problem: Problem, net: NetConfig, seconds: float) -> float:
    """Returns the seconds for one image in `training.accuracy`."""
    module = build(net, problem.shape, problem.num_classes, 0).to(problem.device)
    labels = problem.labels.argmax(1) if problem.labels.is_floating_point() else problem.labels

    def run() -> None:
        for _ in range(ENDLESS):
            training.accuracy(module, problem.images, labels)

    return seconds_per_image(run, problem.device, seconds, unit=1)


def matching_seconds(task: Task, trajectories: int) -> float:
    """Returns the seconds of one iteration of matching on one process (tadperf).

    Times an iteration with T = 1 and a longer one with T' inner steps. The time is linear in T:
        t(T) = (t(1) + (T - 1) (t(T') - t(1)) / (T' - 1)) * trajectories
    On a CPU the inner batch is at most 64 images and the time is multiplied by batch / 64. The recomputed steps of a
    long adjoint (T > 40, at most 10 %) and the time of torch.compile are left out.
    """
    config, (channels, side, _) = task.config.match, task.train.shape
    if config.method in ("tgdd", "infmatch"):
        return _feature_seconds(task) * trajectories
    count = config.seen * task.train.num_classes
    batch = min(config.batch or count, count)
    small = min(batch, CPU_BATCH) if task.device.type == "cpu" else batch
    width = getattr(task.config.net, "width", 1)
    with torch_settings(threads=threads_for(batch * width * side * side), tf32=task.config.tf32):
        images = torch.randn(min(count, 8 * small), channels, side, side, device=task.device)
        first = _iteration_seconds(task, images, small, 1)
        steps = min(config.steps, max(2, int(STEP_BUDGET / max(first, 1e-4))))
        slope = 0.0
        if steps > 1:
            slope = max(0.0, _iteration_seconds(task, images, small, steps) - first) / (steps - 1)
    return (first + (config.steps - 1) * slope) * batch / small * trajectories


def _feature_seconds(task: Task) -> float:
    """Returns the seconds of one draw of a base without inner steps, without the real side of its few snapshots.

    On a CPU, times about 64 images; the time is proportional to them.
    """
    config, classes, (channels, side, _) = task.config.match, task.train.num_classes, task.train.shape
    each = min(config.seen, (config.batch or config.seen * classes) // classes)
    timed = min(each, max(1, CPU_BATCH // classes)) if task.device.type == "cpu" else each
    threads = threads_for(each * classes * task.config.net.width * side * side)
    with torch_settings(threads=threads, tf32=task.config.tf32):
        images = torch.randn(timed * classes, channels, side, side, device=task.device)
        return _iteration_seconds(task, images, len(images), 1) * each / timed


def _iteration_seconds(task: Task, images: Tensor, batch: int, steps: int) -> float:
    """Returns the shortest time of some iterations with this inner batch and number of inner steps."""
    update: dict[str, Any] = {"steps": steps, "batch": batch, "trajectories": 1, "min_start": 0, "max_start": 0}
    update["expert_epochs"] = 1
    if task.device.type == "cpu":
        update["compile"] = "off"
    config, classes = task.config.match.model_copy(update=update), task.train.num_classes
    net = FlatNet(build(task.config.net, task.train.shape, classes, 0).to(task.device))
    start = net.flatten()
    experts = ResidentExperts([torch.stack([start, start + 1e-3 * torch.randn_like(start)])], 0)
    labels = torch.arange(len(images), device=task.device) % classes
    if config.soft_labels:
        labels = torch.nn.functional.one_hot(labels, classes).float()
    state = initial_state(images, labels, config)
    real = Examples(images[:1].expand(classes, *images.shape[1:]), torch.arange(classes))
    problem = MatchProblem(net, experts, config, task.config.data.augment, task.config.seed, real)
    base = BASES[config.method](state, problem)
    times: list[float] = []
    while len(times) < 2 or (len(times) < 6 and sum(times) < STEP_BUDGET / 4):
        synchronise(task.device)
        begin = time.perf_counter()
        launch_iteration(replace(state, iteration=len(times)), base, config).values.read()
        times.append(time.perf_counter() - begin)
        if len(times) == 1 and times[0] > STEP_BUDGET:  # no time for a second one
            break
    return min(times)


def neighbour_seconds(task: Task, count: int, width: int) -> float:
    """Returns the seconds of `estimate_from_neighbours` on `count` samples with features of this width (tadperf).

    Times n / 2 and n samples, n = min(count, 4000), and extrapolates t(n) = a n + b n^2, with a and b not negative.
    """
    classes, large = task.train.num_classes, min(count, 4000)
    sizes = (max(2, large // 2), large)
    times = []
    for size in sizes:
        features = torch.nn.functional.normalize(torch.randn(size, width, device=task.device), dim=1)
        labels = torch.arange(size, device=task.device) % classes
        synchronise(task.device)
        begin = time.perf_counter()
        estimate_from_neighbours(features, labels, classes, 0)
        synchronise(task.device)
        times.append(time.perf_counter() - begin)
    square = (times[1] / sizes[1] - times[0] / sizes[0]) / max(1, sizes[1] - sizes[0])
    square = min(max(0.0, square), times[1] / sizes[1] ** 2)
    linear = times[1] / sizes[1] - square * sizes[1]
    return linear * count + square * count**2


def normalise_seconds(task: Task, sample: Tensor, normalise: Callable[[Tensor], object]) -> float:
    """Returns the seconds of the stage "data" (tadperf).

    The time of a sample of the images, times N / sample. ZCA on D inputs adds its decomposition, t = c D^3, with c from
    a matrix of at most 512 x 512, and the products of all images with D x D matrices. `normalise_work` says how many
    images cost as much as the decomposition.
    """
    begin = time.perf_counter()
    normalise(sample)
    synchronise(task.device)
    images = len(task.train) + len(task.test)
    seconds = (time.perf_counter() - begin) * images / len(sample)
    if task.config.data.normalise == "zca":
        inputs = math.prod(task.train.shape)
        size = min(512, inputs)
        matrix = torch.randn(size, size, dtype=torch.float64, device=task.device)
        begin = time.perf_counter()
        torch.linalg.eigh(matrix @ matrix.T)
        synchronise(task.device)
        decomposition = (time.perf_counter() - begin) * (inputs / size) ** 3
        units = normalise_work("zca", len(task.train), len(task.test), inputs)
        seconds += decomposition * units / work(DECOMPOSITION * inputs)
    return seconds


def diffusion_seconds(task: Task, step: Callable[[int], Any], seconds: float) -> float:
    """Returns the seconds of one step of the diffusion model's training. step: takes one step."""
    step(0)
    synchronise(task.device)
    begin, number = time.perf_counter(), 0
    while number < 1 or time.perf_counter() - begin < seconds:
        number += 1
        step(number)
    synchronise(task.device)
    return (time.perf_counter() - begin) / number
