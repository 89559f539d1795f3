"""Experts: networks trained on real images, whose trajectories the synthetic images will imitate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.compute import ranks
from tadperf.compute.workers import run_parallel
from tadperf.config import ExpertConfig, NetConfig
from tadperf.data.images import Images
from tadperf.experts import store
from tadperf.nets import training
from tadperf.nets.architectures import Shape, build
from tadperf.nets.flat import FlatNet
from tadperf.nets.training import Recipe
from tadperf.progress import Progress, silent


def train_expert(
    images: Images,
    labels: Tensor,
    net: NetConfig,
    shape: Shape,
    num_classes: int,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    weights: Tensor | None = None,
) -> tuple[Tensor, float]:
    """One trajectory: snapshots float32 [epochs + 1, P] from before training on, and the final training accuracy.

    labels: int64 [N], or label logits [N, C], whose largest then counts as right; weights: as for `training.fit`.
    """
    module = build(net, shape, num_classes, seed).to(device)
    flat = FlatNet(module)
    snapshots = [flat.flatten().cpu()]
    training.fit(module, images, labels, recipe, seed, lambda _: snapshots.append(flat.flatten().cpu()), weights)
    right = labels.argmax(1) if labels.is_floating_point() else labels
    return torch.stack(snapshots), training.accuracy(module, images, right)


def train_experts(
    folder: Path,
    images: Images,
    labels: Tensor,
    net: NetConfig,
    shape: Shape,
    num_classes: int,
    config: ExpertConfig,
    epochs: int,
    augment: str,
    seed: int,
    device: torch.device,
    identity: dict[str, Any],
    progress: Progress = silent,
    weights: Tensor | None = None,
) -> None:
    """Trains the experts that `folder` lacks, one file each; on a CPU several at once, one core each.

    identity: all that the trajectories depend on; whoever passes weights has to name them in it.

    Measured on 2 cores: the 8 digits experts take 23 and 28 s in one process, 14 and 12 s in two.
    """
    store.claim(folder, identity)
    recipe = Recipe(
        epochs, config.batch, config.lr, config.momentum, config.weight_decay, augment, False, config.rho, config.alpha
    )
    size = FlatNet(build(net, shape, num_classes, 0)).num_parameters
    shape_on_disk = epochs + 1, size
    missing = ranks.once(lambda: [i for i in range(config.count) if not store.complete(folder, i, shape_on_disk)])
    done = config.count - len(missing)
    progress("experts", done, config.count)

    def train(index: int) -> float:
        snapshots, accuracy = train_expert(
            images, labels, net, shape, num_classes, recipe, seeds.derive(seed, "expert", index), device, weights
        )
        store.save(folder, index, snapshots.to(getattr(torch, config.dtype)), train_accuracy=accuracy)
        return accuracy

    workers = config.workers if device.type == "cpu" else 1
    for _, accuracy in run_parallel(train, missing, workers):
        done += 1
        progress("experts", done, config.count, train_accuracy=accuracy)
