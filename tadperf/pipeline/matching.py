"""The stage matching: turns real images into a synthetic set by trajectory matching."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.compute import ranks
from tadperf.compute.torch_settings import torch_settings
from tadperf.compute.work_progress import reporting, work
from tadperf.compute.workers import available_cores, threads_for
from tadperf.data.enlarge import enlarge, shrink
from tadperf.data.pick import pick_central, pick_real
from tadperf.experts.store import Experts
from tadperf.matching.base import Base, MatchProblem
from tadperf.matching.loop import match_trajectories
from tadperf.matching.starts import correctly_classified, expert_soft_labels
from tadperf.matching.state import MatchState, initial_state
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.nets.students import Examples, Student, StudentScorer, score_students
from tadperf.pipeline.context import RunContext
from tadperf.pipeline.package import INITIAL, package_set, student_recipe
from tadperf.pipeline.scoring import BackgroundScoring, assigned_students, training_work
from tadperf.progress import Progress, silent
from tadperf.task.samples import TrainingSamples
from tadperf.task.task import Task

CHECK_STUDENTS = 2  # trained at every check on held-out samples; a single one varies by about a point on digits


def match(
    context: RunContext,
    experts: Experts,
    refined_images: Tensor | None = None,
    scoring: BackgroundScoring | None = None,
    make_base: Callable[[MatchState, MatchProblem], Base] | None = None,
) -> MatchState:
    """Learns the synthetic set and returns the checkpoint that is best on held-out samples.

    refined_images: normalised images [M, C, H, W] to start from; by default match.init chooses them.
    scoring: starts on the idle cores as soon as the first state is saved.
    make_base: makes the base from the first state and the problem; by default that of match.method.
    """
    task, config = context.task, context.task.config
    net = FlatNet(build(config.net, task.train.shape, task.train.num_classes, 0).to(task.device))
    count, side = config.match.seen * task.train.num_classes, task.train.shape[1]
    batch = min(config.match.batch or count, count)
    threads = threads_for(batch * config.net.width * side**2)
    real = Examples(context.samples.images, context.samples.labels, context.samples.weights)
    problem = MatchProblem(net, experts, config.match, config.data.augment, config.seed, real, side, make_base)

    def check(images: Tensor, labels: Tensor, lr: float, iteration: int) -> float:
        synthetic = Examples(enlarge(images, side), labels)
        return held_out_accuracy(task, context.samples, synthetic, lr, iteration, context.progress)

    def report(stage: str, done: int, total: int, **values: object) -> None:
        if scoring:
            scoring.collect()
        context.progress(stage, done, total, **values)

    with torch_settings(threads=threads):
        with reporting(context.progress, "matching:start", work(len(context.samples.labels))):
            state = ranks.once(lambda: starting_state(task, context.samples, net, experts, refined_images))
        initial = package_set(task, context.data.normaliser, state, config.evaluate.real_lr)
        initial.save(context.run.path / INITIAL)
        if scoring:
            scoring.start(available_cores() - threads)
        return match_trajectories(state, problem, check, context.run, report)


def starting_state(
    task: Task, samples: TrainingSamples, net: FlatNet, experts: Experts, refined_images: Tensor | None = None
) -> MatchState:
    """Returns the state before the first iteration: refined, real or noise images, and hard or soft labels.

    With match.factor, the images are small ones.
    """
    config = task.config.match
    candidates = samples.confirmed_labels
    if config.init_correct:
        correct = correctly_classified(net, experts, samples.images, candidates, task.epochs, config.seen)
        candidates = candidates.where(correct, -1)
    images = _starting_images(task, samples, candidates) if refined_images is None else refined_images.clone()
    labels = torch.arange(task.train.num_classes, device=task.device).repeat_interleave(config.seen)
    if config.soft_labels:
        classes = labels if config.init_correct else None
        labels = expert_soft_labels(net, experts, enlarge(images, task.train.shape[1]), task.epochs, classes)
    return initial_state(images, labels, config)


def _starting_images(task: Task, samples: TrainingSamples, candidates: Tensor) -> Tensor:
    """Returns real images, or noise, as match.init says.

    candidates: int64 [N], the labels of the samples that may be chosen; -1 for the others.
    """
    config, seed = task.config.match, task.config.seed
    generator = seeds.generator(seed, "init")
    if config.init == "kmeans":
        index = pick_central(samples.images, candidates, config.seen, seeds.derive(seed, "kmeans"))
    else:
        index = pick_real(candidates, config.seen, generator)
    images = shrink(samples.images[index], config.factor).clone()
    return torch.randn(images.shape, generator=generator).to(images) if config.init == "noise" else images


def held_out_accuracy(
    task: Task, samples: TrainingSamples, synthetic: Examples, lr: float, iteration: int, progress: Progress = silent
) -> float:
    """Returns the mean accuracy, on held-out samples, of students trained on the synthetic set at this iteration."""
    config = task.config
    recipe, seed = student_recipe(config, lr), seeds.derive(config.seed, "check", iteration)
    students = [Student("check", repeat, config.net, recipe, lambda: synthetic) for repeat in range(CHECK_STUDENTS)]
    scorer = StudentScorer(samples.held_out, samples.held_out_labels, task.train.num_classes, seed, task.device)
    scores: list[float] = []
    with reporting(progress, "matching:check", training_work(assigned_students(students), len(samples.held_out))):
        score_students(scorer, students, lambda _, score: scores.append(score))
    return sum(sorted(scores)) / len(scores)
