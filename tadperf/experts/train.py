"""Trains experts: networks on real images, whose trajectories the synthetic images imitate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.compute import ranks
from tadperf.compute.transfer import Download
from tadperf.compute.work_progress import reporting, work
from tadperf.compute.workers import run_parallel
from tadperf.config import ExpertConfig
from tadperf.experts import store
from tadperf.nets import training
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.nets.problem import Problem
from tadperf.nets.training import Recipe
from tadperf.progress import Progress, silent


def train_expert(
    problem: Problem, recipe: Recipe, seed: int, precision: torch.dtype = torch.float32
) -> tuple[Tensor, float]:
    """Trains one expert; returns its snapshots float32 [epochs + 1, P] and the final training accuracy.

    The first snapshot holds the initial weights. For label logits [N, C] the largest one counts as the label.
    seed: seed of this expert; `problem.seed` and `problem.augment` are not used. precision: as for `training.fit`.
    """
    module = build(problem.net, problem.shape, problem.num_classes, seed).to(problem.device)
    flat = FlatNet(module)
    snapshots: list[Tensor] = []
    latest = Download(flat.flatten())

    def keep(epoch: int) -> None:
        nonlocal latest
        before, latest = latest, Download(flat.flatten())
        snapshots.append(before.read().clone())  # one epoch late, so that CUDA never runs out of work

    images, labels = problem.images, problem.labels
    training.fit(module, images, labels, recipe, seed, keep, problem.weights, precision)
    snapshots.append(latest.read())
    classes = labels.argmax(1) if labels.is_floating_point() else labels
    return torch.stack(snapshots), training.accuracy(module, images, classes)


def train_experts(
    folder: Path,
    problem: Problem,
    config: ExpertConfig,
    epochs: int,
    identity: dict[str, Any],
    progress: Progress = silent,
) -> None:
    """Trains the experts that `folder` lacks and writes one file each. A CPU trains `config.workers` at a time.

    identity: everything that the trajectories depend on; a caller that passes weights has to include them.
    Raises UserError if the folder holds experts of another identity.

    Measured on 2 cores: the 8 digits experts take 23 and 28 s in one process, 14 and 12 s in two.
    """
    store.claim_folder(folder, identity)
    recipe = Recipe(
        epochs,
        config.batch,
        config.lr,
        config.momentum,
        config.weight_decay,
        problem.augment,
        decay=False,
        rho=config.rho,
        alpha=config.alpha,
    )
    shape = epochs + 1, FlatNet(build(problem.net, problem.shape, problem.num_classes, 0)).num_parameters
    missing = ranks.once(lambda: [i for i in range(config.count) if not store.is_complete(folder, i, shape)])
    done = config.count - len(missing)
    progress("experts", done, config.count)

    def train(index: int) -> float:
        seed, precision = seeds.derive(problem.seed, "expert", index), getattr(torch, config.precision)
        snapshots, accuracy = train_expert(problem, recipe, seed, precision)
        store.save_expert(folder, index, snapshots.to(getattr(torch, config.dtype)), train_accuracy=accuracy)
        return accuracy

    workers = config.workers if problem.device.type == "cpu" else 1
    images = len(problem.images) * len(ranks.assigned(len(missing)))
    with reporting(progress, "experts:training", work(epochs * images, images)):
        for _, accuracy in run_parallel(train, missing, workers):
            done += 1
            progress("experts", done, config.count, train_accuracy=accuracy)
