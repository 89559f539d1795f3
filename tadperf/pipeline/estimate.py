"""Estimates what a job will take, before it starts: seconds by stage, memory and disk.

Every figure is a count, which the config implies, times the result of a short probe (`tadperf.pipeline.probes`) on this
machine. The probes run in as many processes as the job would use, one thread each.

Checked on 2 cores in CPU seconds on the longest path (estimate / run; one run each):

    job                                           trust        experts      matching     evaluate
    digits, the default job                       11.0 / 11.9  7.2 / 7.4    14.3 / 19.8  2.5 / 2.9
    3000 CIFAR-10 images, a short `quick` job     22.1 / 26.3  9.7 / 5.6    18.3 / 20.5  0.9 / 1.2

Trust kept 58 % of the CIFAR-10 labels. The estimate cannot know that, so experts took less time. Memory: 469 / 517 MB
and 487 / 572 MB. Disk: 12.6 / 12.8 MB and 3.8 / 4.2 MB. Nothing was checked on CUDA.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch

from tadperf.compute.device import resolve_device
from tadperf.compute.torch_settings import torch_settings
from tadperf.compute.workers import available_cores, threads_for
from tadperf.config import Config
from tadperf.data.enlarge import small_side
from tadperf.data.images import MAX_NORMALISED_BYTES, normalise_images
from tadperf.data.mapped import is_large
from tadperf.data.normalise import fit_normaliser
from tadperf.data.open import open_config
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.nets.problem import Problem
from tadperf.nets.training import Recipe
from tadperf.pipeline import probes
from tadperf.pipeline.matching import CHECK_STUDENTS
from tadperf.pipeline.package import student_recipe
from tadperf.pipeline.plan import stage_names
from tadperf.pipeline.scoring import LADDER_REPEATS
from tadperf.progress import Progress, silent
from tadperf.refine.models.base import Target
from tadperf.refine.models.train import PixelSamples, initial_training, train_step
from tadperf.refine.models.unet import schedulers
from tadperf.refine.networks import expected_batches
from tadperf.run.stage_meter import children_peak, cuda_peak, process_peak
from tadperf.task.task import Task
from tadperf.trust.proxies import AVERAGED_EPOCHS, MAX_FEATURES

PROBE_SECONDS = 1.2  # of each training probe after its warm-up
SAMPLE = 2048  # images of a probe; more only if a batch is larger
VERDICT_BYTES = 40  # a sample's row in trust.safetensors and one round's file; 29 and rounding
ROW_BYTES = 80  # of a sample in labels.csv; names of files are longer


class Workers(NamedTuple):
    """The processes of a job. tasks: networks that train at a time. trajectories: per process and iteration."""

    ranks: int
    cores: int  # of each rank
    tasks: int
    trajectories: int


def makespan(durations: Sequence[float], workers: int) -> float:
    """Returns when the last task ends if each of the workers takes the next task of the list when it is free."""
    ends = [0.0] * max(1, min(workers, len(durations)))
    for seconds in durations:
        heapq.heappush(ends, heapq.heappop(ends) + seconds)
    return max(ends)


def job_workers(task: Task, ranks: int) -> Workers:
    """Returns the processes of a job with this many ranks. On a CPU the ranks divide the cores."""
    cores = max(1, available_cores() // ranks)
    tasks = ranks * (cores if task.device.type == "cpu" else 1)
    return Workers(ranks, cores, tasks, -(-task.config.match.trajectories // ranks))


def audit_task(config: Config, progress: Progress = silent) -> Task:
    """Opens the training split that an audit would read. Its task has one of these images as the test split."""
    train = open_config(config.data, progress)[0]
    return Task(config, train, train.subset(torch.arange(1)), resolve_device(config.device))


def estimate_audit(task: Task, ranks: int = 1) -> dict[str, Any]:
    """Returns the estimate of `tadperf audit`: the stages data and trust."""
    return _Estimate(task, ranks).result(("data", "trust"))


def estimate_distill(task: Task, ranks: int = 1) -> dict[str, Any]:
    """Returns the estimate of `tadperf distill`.

    {"stages": {stage: seconds}, "seconds", "memory_bytes", "disk": {file: bytes}, "disk_bytes", "counts", "device",
    "processes"}; with CUDA also "cuda_bytes". The stage "trust" may end after fewer rounds, so its figure is an upper
    bound. Decoding, k-means for the first images, torch.compile, pages and pictures are left out.
    """
    return _Estimate(task, ranks).result(stage_names(task.config))


class _Estimate:
    """The probes of a task, run when a stage first needs them, and the formulas of the stages."""

    def __init__(self, task: Task, ranks: int) -> None:
        self.task, self.config, self.workers = task, task.config, job_workers(task, ranks)
        self.on_cpu = task.device.type == "cpu"
        self.net = FlatNet(build(self.config.net, task.train.shape, task.train.num_classes, 0))
        largest = max(self.config.trust.batch, self.config.experts.batch, self.config.evaluate.batch)
        index = torch.arange(len(task.train))[: max(SAMPLE, 2 * largest)]
        pixels = task.train.images[index]
        normalise = fit_normaliser(pixels)  # ZCA changes no time of a network

        def normalised(part: torch.Tensor) -> Any:
            return normalise_images(fit_normaliser(part), part, task.device)

        images = normalise_images(normalise, pixels, task.device)
        names, augment, seed = task.train.class_names, self.config.data.augment, self.config.seed
        labels = task.train.labels[index]
        self.problem = Problem(images, labels, names, self.config.net, augment, seed, task.device)
        self.data_seconds = probes.normalise_seconds(task, pixels, normalised)
        self.tested = self._run(partial(probes.testing_seconds, self.problem, self.config.net, 0.4), self.workers.tasks)
        self._student: dict[str, float] = {}

    def _run(self, probe: Any, tasks: int) -> float:
        """Runs a probe in as many processes of this machine as the job would use."""
        local = min(tasks, self.workers.tasks) if self.on_cpu else 1
        with torch_settings(tf32=self.config.tf32):
            return probes.side_by_side(probe, max(1, local))

    def result(self, stages: Sequence[str]) -> dict[str, Any]:
        seconds: dict[str, float] = {}
        for stage in stages:
            background = (seconds.get("matching", 0.0),) if stage == "evaluate" else ()
            seconds[stage] = getattr(self, stage)(*background)
        disk = disk_bytes(self.task, self.net.num_parameters, stages)
        return {
            "stages": {stage: round(value, 2) for stage, value in seconds.items()},
            "seconds": round(sum(seconds.values()), 2),
            "memory_bytes": self.memory_bytes(stages),
            **({"cuda_bytes": int(cuda_peak()["peak_cuda_mb"] * 2**20)} if cuda_peak() else {}),
            "disk": disk,
            "disk_bytes": sum(disk.values()),
            "counts": {
                "train": len(self.task.train),
                "test": len(self.task.test) if "evaluate" in stages else 0,
                "parameters": self.net.num_parameters,
            },
            "device": str(self.task.device),
            "processes": {"ranks": self.workers.ranks, "tasks": self.workers.tasks},
        }

    def data(self) -> float:
        return self.data_seconds

    def trust(self) -> float:
        """Returns rounds * (proxies side by side + neighbours).

        A proxy trains on epochs * N' images, with N' = N (1 - 1 / proxies) if it holds out a fold, and tests N images
        in each averaged epoch and for its features.
        """
        trust, count = self.config.trust, len(self.task.train)
        trained = self._run(partial(probes.proxy_seconds, self.problem, self.task, PROBE_SECONDS), trust.proxies)
        share = 1 - 1 / trust.proxies if trust.held_out and trust.proxies > 1 else 1.0
        tests = min(AVERAGED_EPOCHS, trust.epochs) + 1
        one = trust.epochs * share * count * trained + tests * count * self.tested
        neighbours = probes.neighbour_seconds(self.task, count, MAX_FEATURES) if trust.graph else 0.0
        return trust.rounds * (makespan([one] * trust.proxies, self.workers.tasks) + neighbours)

    @property
    def kept(self) -> int:
        """Returns the number of training samples after those that are held out; trust may leave out some more."""
        return round(len(self.task.train) * (1 - self.config.data.holdout))

    def experts(self) -> float:
        """Returns the makespan of `count` experts, each epochs * N trained images and N tested ones."""
        config = self.config.experts
        recipe = Recipe(
            self.task.epochs,
            config.batch,
            config.lr,
            config.momentum,
            config.weight_decay,
            self.config.data.augment,
            rho=config.rho,
            alpha=config.alpha,
        )
        tasks = min(config.count, self.workers.ranks * (config.workers or self.workers.cores)) if self.on_cpu else 1
        precision = getattr(torch, config.precision)
        probe = partial(probes.training_seconds, self.problem, self.config.net, recipe, precision, PROBE_SECONDS)
        one = self.kept * (self.task.epochs * self._run(probe, tasks) + self.tested)
        return makespan([one] * config.count, tasks if self.on_cpu else self.workers.tasks)

    def matching(self) -> float:
        """Returns iterations * t(T), plus the checks: two students each, on the synthetic set.

        Feature matching also tests all real samples under each of its snapshots, but no snapshot twice.
        """
        config, held_out = self.config.match, len(self.task.train) - self.kept
        checks = -(-config.iterations // config.check_every)
        student = self.student(self.config.net.name, self.synthetic, self.config.evaluate.epochs, held_out)
        seconds = config.iterations * probes.matching_seconds(self.task, self.workers.trajectories)
        if config.method in ("tgdd", "infmatch"):
            snapshots = self.config.experts.count * (config.max_start - config.min_start + 1)
            drawn = min(snapshots, config.iterations * self.workers.trajectories)
            # infmatch takes three gradients of all samples; a gradient takes about three times as long as a test.
            seconds += drawn * self.kept * self.tested * (9 if config.method == "infmatch" else 1)
        return seconds + checks * makespan([student] * CHECK_STUDENTS, self.workers.tasks)

    @property
    def synthetic(self) -> int:
        return self.config.match.seen * self.task.train.num_classes

    def student(self, network: str, images: int, epochs: int, tested: int) -> float:
        """Returns epochs * images * t(trained image) + tested images * t(tested image).

        t(tested image) is that of the config's network.
        """
        if network not in self._student:
            net, recipe = self.config.net.model_copy(update={"name": network}), student_recipe(self.config, 0.01)
            probe = partial(probes.training_seconds, self.problem, net, recipe, torch.float32, PROBE_SECONDS)
            self._student[network] = self._run(probe, self.workers.tasks)
        return epochs * images * self._student[network] + tested * self.tested

    def evaluate(self, background: float) -> float:
        """Returns the makespan of the students that are left when matching ends after `background` seconds.

        Baselines train during matching on the cores that it leaves idle (one rank on a CPU only).
        """
        config, test, name = self.config.evaluate, len(self.task.test), self.config.net.name
        small = partial(self.student, images=self.synthetic, epochs=config.epochs, tested=test)
        full = partial(self.student, name, epochs=config.full_epochs, tested=test)
        baselines = [small(name)] * (2 * config.repeats) + [full(images=len(self.task.train))] * config.full_repeats
        if self.config.trust.mode != "off":
            baselines += [full(images=len(self.task.train))] * config.full_repeats
        ladder_rows = (self.config.trust.mode != "off") + self.config.match.soft_labels
        baselines += [small(name)] * (ladder_rows * min(config.repeats, LADDER_REPEATS))
        batch = min(self.config.match.batch or self.synthetic, self.synthetic)
        widest = batch * self.config.net.width * self.task.train.shape[1] ** 2
        idle = available_cores() - threads_for(widest) if self.on_cpu and self.workers.ranks == 1 else 0
        running = [0.0] * idle
        while running and baselines and min(running) < background:
            heapq.heappush(running, heapq.heappop(running) + baselines.pop(0))
        distilled = [small(network) for network in config.networks for _ in range(config.repeats)]
        left = max([0.0, *(end - background for end in running)])
        return max(left, makespan([*distilled, *baselines], self.workers.tasks))

    def detector(self) -> float:
        """Returns epochs * N * t(trained image) of the detector, in one process; 0 if the user gives its weights."""
        config = self.config.detector
        if config.path:
            return 0.0
        recipe = Recipe(1, config.batch, config.lr, config.momentum, config.weight_decay, self.config.data.augment)
        probe = partial(probes.training_seconds, self.problem, config, recipe, torch.float32, PROBE_SECONDS)
        with torch_settings(threads=self.diffusion_threads, tf32=self.config.tf32):
            return config.epochs * self.kept * probe()

    @property
    def diffusion_threads(self) -> int:
        _, height, width = self.task.train.shape
        return threads_for(self.config.diffusion.batch * self.config.diffusion.width * height * width)

    def diffusion(self) -> float:
        """Returns iterations * t(step); 0 if the user gives the model."""
        if self.config.refine.source != "train":
            return 0.0
        return self.config.diffusion.iterations * self.diffusion_step

    @cached_property
    def diffusion_step(self) -> float:
        """Returns the seconds of one training step of the diffusion model."""
        config, task = self.config.diffusion, self.task
        target = Target(task.train.shape, task.train.class_names, task.device)
        samples = PixelSamples(lambda index: task.train.images[index], task.train.labels, None)
        state, (noising, _) = initial_training(target, config, 0), schedulers()
        step = partial(train_step, state, noising, samples, target, config, 0)
        with torch_settings(threads=self.diffusion_threads, tf32=self.config.tf32):
            return probes.diffusion_seconds(task, step, PROBE_SECONDS)

    def refine(self) -> float:
        """Returns batches * denoising steps * t(forward pass) of the trained model; for a user's model 0.

        A forward pass takes a third of a training step, and guidance doubles the images.
        """
        refine = self.config.refine
        if refine.source != "train":
            return 0.0
        batches = expected_batches(self.config, self.task.train.num_classes, refine.start is not None)
        steps = math.ceil(refine.steps * refine.strength) * (2 if refine.guidance > 1 else 1)
        forward = self.diffusion_step / 3 * refine.batch / self.config.diffusion.batch
        return -(-batches // self.workers.ranks) * steps * forward

    def memory_bytes(self, stages: Sequence[str]) -> int:
        """Returns the peak of the largest process: that of the probes, and what they did not hold.

        float32 images up to 2 GiB; probabilities [N, C] of each proxy and of the verdicts; features [N, 512] twice; the
        synthetic images, their velocity, average, gradient and best checkpoint; the parameter vectors of the adjoint.
        """
        count, pixels = len(self.task.train) + len(self.task.test), 4 * math.prod(self.task.train.shape)
        floats = count * pixels if count * pixels <= MAX_NORMALISED_BYTES else 0
        held = max(process_peak(), children_peak()) + (floats if self.on_cpu else 0)
        rows = len(self.task.train)
        verdicts = 4 * rows * ((self.config.trust.proxies + 2) * self.task.train.num_classes + 2 * MAX_FEATURES)
        vectors = 4 * self.net.num_parameters * min(40, self.config.match.steps) + 5 * self.synthetic * pixels
        return int(held + max(verdicts * ("trust" in stages), vectors * ("matching" in stages)))


def disk_bytes(task: Task, parameters: int, stages: Sequence[str]) -> dict[str, int]:
    """Returns the bytes of the files that a job writes, by name.

    experts: count * (epochs + 1) * P * bytes of a value. checkpoints: images, velocity and average of three states, and
    the initial set. trust: one row per sample and round, and labels.csv. cache: the decoded images, if they are mapped.
    """
    config, samples = task.config, len(task.train)
    image = 4 * math.prod(task.train.shape)
    stored = image * small_side(task.train.shape[1], config.match.factor) ** 2 // task.train.shape[1] ** 2
    synthetic = config.match.seen * task.train.num_classes * (stored + 4 * task.train.num_classes)
    value = 2 if config.experts.dtype == "bfloat16" else 4
    images = (samples + len(task.test)) * math.prod(task.train.shape)
    sizes = {
        "experts": config.experts.count * (task.epochs + 1) * parameters * value,
        "trust": samples * (VERDICT_BYTES * (config.trust.rounds + 1) + ROW_BYTES),
        "checkpoints": 10 * synthetic,
        "distilled": synthetic,
    }
    needed = {"experts": "experts", "trust": "trust", "checkpoints": "matching", "distilled": "evaluate"}
    sizes = {name: size for name, size in sizes.items() if needed[name] in stages}
    return sizes | ({"cache": images} if is_large((samples, *task.train.shape)) else {})
