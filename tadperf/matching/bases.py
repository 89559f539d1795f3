"""The bases as values of the config: MTT (Cazenavette et al., 2022), FTD (Du et al., 2023), DATM (Guo et al., 2024).

They share the loop and the gradient. FTD matches flat experts, trained by GSAM, and keeps a moving average of the
images. DATM matches such experts too, from easy starts to hard ones; its images begin as samples that an expert
classifies rightly, and their labels as the logits of the experts that do, and are learned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from tadperf.config import MatchConfig
    from tadperf.experts.store import Experts
    from tadperf.nets import FlatNet
    from tadperf.training import Images

# rho and alpha are those that DATM's public code names for both; FTD's table has alpha 0.3 or 1, ema 0.999 to 0.9999.
FLAT = {"rho": 0.01, "alpha": 0.3}
BASES: dict[str, dict[str, dict[str, Any]]] = {
    "mtt": {},
    "ftd": {"experts": FLAT, "match": {"ema": 0.9995}},
    "datm": {
        "experts": FLAT,
        "match": {
            "easy": 0.5, "widen": 0.1, "init_correct": True, "soft_labels": True, "lr_label": 2.0,
            "momentum_label": 0.9,
        },
    },
}  # fmt: skip


def start_range(config: MatchConfig, iteration: int) -> tuple[int, int]:
    """First and last expert epoch that may be started from: widens linearly from easy to hard (DATM)."""
    end = config.widen * config.iterations
    opened = config.easy + (1 - config.easy) * (iteration / end) if iteration < end else 1.0
    return config.min_start, config.min_start + round(opened * (config.max_start - config.min_start))


def learned(
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
