"""Chooses where matching starts: expert epochs, label logits, and samples that the experts classify correctly."""

from __future__ import annotations

import torch
from torch import Tensor

from tadperf.config import MatchConfig
from tadperf.data.images import Images
from tadperf.experts.store import Experts
from tadperf.nets.flat import FlatNet


def expert_soft_labels(
    net: FlatNet, experts: Experts, images: Tensor, epoch: int, classes: Tensor | None = None
) -> Tensor:
    """Returns label logits [M, K] to start from: the mean logits of the experts after `epoch` epochs (tadperf).

    classes: the images' classes, int64 [M]. If given, averages for each image over the experts that classify it
    correctly, or over all experts if none does (DATM).
    """
    with torch.no_grad():
        logits = torch.stack([net(experts.snapshot(e, epoch).to(images), images) for e in range(len(experts))])
    if classes is None:
        return logits.mean(0)
    counted = logits.argmax(2) == classes.to(logits.device)  # [experts, M]
    counted |= ~counted.any(0)
    return (logits * counted[:, :, None]).sum(0) / counted.sum(0)[:, None]


def start_range(config: MatchConfig, iteration: int) -> tuple[int, int]:
    """Returns the first and the last expert epoch to start from. The range widens linearly from easy to hard (DATM)."""
    end = config.widen * config.iterations
    opened = config.easy + (1 - config.easy) * (iteration / end) if iteration < end else 1.0
    return config.min_start, config.min_start + round(opened * (config.max_start - config.min_start))


def correctly_classified(
    net: FlatNet, experts: Experts, images: Images, labels: Tensor, epoch: int, least: int, batch: int = 1024
) -> Tensor:
    """Returns bool [N]: the samples that an expert classifies correctly after `epoch` epochs (DATM).

    Tries the first expert, then the next ones for the classes with fewer than `least` correct samples. If a class is
    still short after the last expert, all its samples are returned.
    labels: int64 [N]; -1 for samples that may not be returned.
    """
    classes, correct = int(labels.max()) + 1, torch.zeros_like(labels, dtype=torch.bool)
    allowed = labels >= 0
    short = torch.bincount(labels[allowed], minlength=classes) > 0  # [classes]
    for expert in range(len(experts)):
        theta = experts.snapshot(expert, epoch)
        candidates = allowed & short[labels.clamp(min=0)]
        for index in candidates.nonzero()[:, 0].split(batch):
            x = images[index]
            correct[index] |= net(theta.to(x), x).argmax(1).to(labels) == labels[index]
        short = torch.bincount(labels[correct], minlength=classes) < least
        if not short.any():
            break
    return correct | (allowed & short[labels.clamp(min=0)])


def draw_snapshots(
    experts: int, config: MatchConfig, iteration: int, generator: torch.Generator
) -> tuple[int, int, int]:
    """Draws an expert, the epoch t of a snapshot, and that of a later one, at most `expert_epochs` after t."""
    expert = int(torch.randint(experts, (), generator=generator))
    low, high = start_range(config, iteration)
    start = int(torch.randint(low, high + 1, (), generator=generator))
    return expert, start, start + int(torch.randint(config.expert_epochs + 1, (), generator=generator))
