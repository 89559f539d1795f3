"""The stages experts and matching: from real samples to a synthetic set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.compute import ranks
from tadperf.compute.workers import available_cores, threads_for
from tadperf.data.pick import pick_central, pick_real
from tadperf.experts.store import Experts
from tadperf.experts.train import train_experts
from tadperf.matching.loop import match_trajectories
from tadperf.matching.starts import correctly_classified, expert_soft_labels
from tadperf.matching.state import MatchState, initial_state
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.nets.students import Examples, Student, score_students
from tadperf.pipeline.package import INITIAL, package_set, student_recipe
from tadperf.progress import Progress
from tadperf.refine.loop import RefinedImages
from tadperf.run.folder import Run
from tadperf.task.samples import NormalisedData, TrainingSamples
from tadperf.task.task import Task, expert_identity, shared_experts_folder

CHECKERS = 2  # trained at every check on held-out samples; one alone varies by about a point on digits


def get_experts(task: Task, seen: TrainingSamples, run: Run, progress: Progress) -> Experts:
    """The run's own experts, trained where they are missing, or those of another run."""
    config, train = task.config, task.train
    if config.experts.path:
        folder = shared_experts_folder(task)
    else:
        folder = run.path / "experts"
        train_experts(
            folder,
            seen.images,
            seen.labels,
            config.net,
            train.shape,
            train.num_classes,
            config.experts,
            task.epochs,
            config.data.augment,
            config.seed,
            task.device,
            expert_identity(task),
            progress,
            seen.weights,
        )
    return Experts.open(folder, config.experts.count)


def first_state(
    task: Task, seen: TrainingSamples, net: FlatNet, experts: Experts, made: RefinedImages | None = None
) -> MatchState:
    """Synthetic images before the first iteration: real ones, random or central, or noise; or the refined ones."""
    match, classes = task.config.match, task.train.num_classes
    generator = seeds.generator(task.config.seed, "init")
    candidates = seen.labels.where(seen.certain, -1)
    if match.init_correct:
        rightly = correctly_classified(net, experts, seen.images, candidates, task.epochs, match.ipc)
        candidates = candidates.where(rightly, -1)
    if made is not None:
        images = made.images.clone()
    else:
        if match.init == "kmeans":
            index = pick_central(seen.images, candidates, match.ipc, seeds.derive(task.config.seed, "kmeans"))
        else:
            index = pick_real(candidates, match.ipc, generator)
        images = seen.images[index].clone()
        if match.init == "noise":
            images = torch.randn(images.shape, generator=generator).to(images)
    labels = torch.arange(classes, device=task.device).repeat_interleave(match.ipc)
    if match.soft_labels:
        labels = expert_soft_labels(net, experts, images, task.epochs, labels if match.init_correct else None)
    return initial_state(images, labels, match)


def match(
    task: Task,
    data: NormalisedData,
    seen: TrainingSamples,
    experts: Experts,
    run: Run,
    progress: Progress,
    made: RefinedImages | None = None,
    beside: Callable[[int], Callable[[], None]] | None = None,
) -> MatchState:
    """Learns the synthetic set, from refined images where there are some; held-out samples choose the checkpoint.

    beside: begins other work on so many idle cores, as soon as the first state is there; what it gives is called often.
    """
    config, train = task.config, task.train
    net = FlatNet(build(config.net, train.shape, train.num_classes, 0).to(task.device))
    count = config.match.ipc * train.num_classes
    batch = min(config.match.batch or count, count)
    threads = threads_for(batch * config.net.width * train.shape[1] * train.shape[2])
    torch.set_num_threads(threads)

    def check(images: Tensor, labels: Tensor, lr: float, iteration: int) -> float:
        recipe, seed = student_recipe(config, lr), seeds.derive(config.seed, "check", iteration)
        pupils = [
            Student("check", repeat, config.net, recipe, lambda: Examples(images, labels)) for repeat in range(CHECKERS)
        ]
        held, scores = (seen.held_out, seen.held_out_labels), []
        score_students(pupils, *held, train.num_classes, seed, task.device, lambda _, score: scores.append(score))
        return sum(sorted(scores)) / len(scores)

    state = ranks.once(lambda: first_state(task, seen, net, experts, made))
    package_set(task, data, state, config.evaluate.real_lr).save(run.path / INITIAL)
    collect = beside(available_cores() - threads) if beside else None

    def watched(stage: str, done: int, total: int, **values: object) -> None:
        if collect:
            collect()
        progress(stage, done, total, **values)

    return match_trajectories(state, net, experts, config.match, config.data.augment, config.seed, check, run, watched)
