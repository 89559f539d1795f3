"""Where matching starts: the epochs of the experts, the labels and the samples that the experts know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tadperf.experts.store import Experts
from tadperf.nets.flat import FlatNet

if TYPE_CHECKING:
    from torch import Tensor

    from tadperf.config import MatchConfig
    from tadperf.data.images import Images


def expert_soft_labels(
    net: FlatNet, experts: Experts, images: Tensor, epoch: int, right: Tensor | None = None
) -> Tensor:
    """Label logits [M, K] to start from: the mean of the experts' logits after `epoch` epochs (tadperf).

    right: the images' classes, int64 [M]; with them only experts that classify an image rightly have a say in it, where
    there is one (DATM).
    """
    with torch.no_grad():
        logits = torch.stack([net(experts.snapshot(e, epoch).to(images), images) for e in range(len(experts))])
    if right is None:
        return logits.mean(0)
    says = logits.argmax(2) == right.to(logits.device)
    says |= ~says.any(0)
    return (logits * says[:, :, None]).sum(0) / says.sum(0)[:, None]


def start_range(config: MatchConfig, iteration: int) -> tuple[int, int]:
    """First and last expert epoch that may be started from: widens linearly from easy to hard (DATM)."""
    end = config.widen * config.iterations
    opened = config.easy + (1 - config.easy) * (iteration / end) if iteration < end else 1.0
    return config.min_start, config.min_start + round(opened * (config.max_start - config.min_start))


def correctly_classified(
    net: FlatNet, experts: Experts, images: Images, labels: Tensor, epoch: int, least: int, batch: int = 1024
) -> Tensor:
    """Which samples an expert classifies rightly after `epoch` epochs: bool [N] (DATM).

    The first expert is asked, and the others for classes where fewer than `least` samples are found; all samples of a
    class that no expert knows are taken.
    labels: int64 [N]; -1 is no candidate.
    """
    classes, found = int(labels.max()) + 1, labels.new_zeros(len(labels)).bool()
    short = (labels + 1).bincount(minlength=classes + 1).roll(-1) > 0  # the last place is that of -1
    for expert in range(len(experts)):
        short[-1] = False
        theta = experts.snapshot(expert, epoch)
        for index in short[labels].nonzero()[:, 0].split(batch):
            x = images[index]
            found[index] |= net(theta.to(x), x).argmax(1).to(labels) == labels[index]
        short = labels[found].bincount(minlength=classes + 1) < least
        if not short[:-1].any():
            break
    short[-1] = False
    return found | short[labels]
