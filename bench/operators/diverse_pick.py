"""Compares tadperf.kernels.diverse_pick with the usual loop in PyTorch: `tadperf bench diverse_pick`.

Shapes: A rejected images, K candidates for each of them, D features, G classes with 50 qualified images each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tadperf.bench.operators.engine import Bench, Provider, Size
from tadperf.kernels import DiversePick, diverse_pick, diverse_pick_reference

QUALIFIED = 50  # qualified images of each class


def inputs(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    anomalies, choices, width, classes = size
    generator = torch.Generator(device).manual_seed(seed)
    candidates = torch.randn(anomalies, choices, width, device=device, generator=generator, dtype=dtype)
    scores = torch.rand(anomalies, choices, device=device, generator=generator, dtype=dtype)
    qualified = torch.randn(classes * QUALIFIED, width, device=device, generator=generator, dtype=dtype)
    wanted = torch.randint(classes, (anomalies,), device=device, generator=generator)
    return candidates, scores, qualified, wanted, torch.arange(classes, device=device).repeat(QUALIFIED)


def moved(size: Size, dtype: torch.dtype) -> int:
    """Bytes: reads candidates, scores, qualified features and classes, writes an index and a similarity."""
    anomalies, choices, width, classes = size
    read = (anomalies * choices * (width + 1) + classes * QUALIFIED * width) * dtype.itemsize
    return read + (anomalies + classes * QUALIFIED) * 8 + anomalies * (8 + 4)


def eager(
    candidates: Tensor, scores: Tensor, qualified: Tensor, classes: Tensor, qualified_classes: Tensor
) -> DiversePick:
    """Runs the published loop over images: picks the candidate whose largest cosine to its class is the smallest."""
    units, pool = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (candidates, qualified))
    members = {label: pool[qualified_classes == label] for label in qualified_classes.unique().tolist()}
    index, similarity = torch.empty_like(classes), units.new_empty(len(classes))
    for anomaly, label in enumerate(classes.tolist()):
        similarity[anomaly], index[anomaly] = (units[anomaly] @ members[label].T).amax(-1).min(-1)
        members[label] = torch.cat([members[label], units[anomaly, index[anomaly]].unsqueeze(0)])
    return DiversePick(index, similarity)


def stepwise(
    candidates: Tensor, scores: Tensor, qualified: Tensor, classes: Tensor, qualified_classes: Tensor
) -> DiversePick:
    """Picks for all classes at once, one image of each class per step. Picked candidates fill free rows of a table."""
    units, pool = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (candidates, qualified))
    labels, classes_at = qualified_classes.unique(return_inverse=True)
    order = classes.argsort(stable=True)
    label = torch.searchsorted(labels, classes)
    counts, sizes = label.bincount(minlength=len(labels)), classes_at.bincount(minlength=len(labels))
    turn = torch.arange(len(classes), device=classes.device) - (counts.cumsum(0) - counts)[label[order]]
    table = units.new_zeros(len(labels), int((counts + sizes).max()), units.shape[-1])
    by_class = classes_at.argsort(stable=True)
    row = torch.arange(len(by_class), device=by_class.device) - (sizes.cumsum(0) - sizes)[classes_at[by_class]]
    table[classes_at[by_class], row] = pool[by_class]
    free = torch.arange(table.shape[1], device=table.device) >= sizes.unsqueeze(1)
    index, similarity = torch.empty_like(classes), units.new_empty(len(classes))
    for step in range(int(counts.max()) if len(classes) else 0):
        now = order[turn == step]
        group = label[now]
        cosines = torch.bmm(units[now], table[group].mT).masked_fill(free[group].unsqueeze(1), -2)
        similarity[now], index[now] = cosines.amax(-1).min(-1)
        table[group, sizes[group] + step] = units[now, index[now]]
        free[group, sizes[group] + step] = False
    return DiversePick(index, similarity)


BENCH = Bench(
    name="diverse_pick",
    axes=("A", "K", "D", "G"),
    sizes=dict.fromkeys(("cpu", "cuda"), ((1000, 10, 512, 20), (5000, 10, 512, 100))),
    inputs=inputs,
    moved=moved,
    reference=diverse_pick_reference,
    # no torch.compile: the set of picked images changes its shape in each of a thousand steps
    providers={
        "tadperf": Provider("tadperf", lambda: diverse_pick),
        "eager": Provider("eager", lambda: eager),
        "eager-stepwise": Provider("eager", lambda: stepwise),
    },
    tolerance={"similarity": (1e-4, 1e-5)},
)
