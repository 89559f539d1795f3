"""tadperf.kernels.diverse_pick against the loop that one would write: `tadperf bench diverse_pick`.

A anomalous images of K candidates with D features, in G classes that hold 50 qualified images each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tadperf.bench.operators.engine import Bench, Provider, Size
from tadperf.kernels import DiversePick, diverse_pick, diverse_pick_reference

HELD = 50  # qualified images of each class


def inputs(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    anomalies, choices, width, classes = size
    generator = torch.Generator(device).manual_seed(seed)
    candidates = torch.randn(anomalies, choices, width, device=device, generator=generator, dtype=dtype)
    scores = torch.rand(anomalies, choices, device=device, generator=generator, dtype=dtype)
    qualified = torch.randn(classes * HELD, width, device=device, generator=generator, dtype=dtype)
    wanted = torch.randint(classes, (anomalies,), device=device, generator=generator)
    return candidates, scores, qualified, wanted, torch.arange(classes, device=device).repeat(HELD)


def moved(size: Size, dtype: torch.dtype) -> int:
    """Candidates, scores, qualified features and classes read; an index and a similarity written."""
    anomalies, choices, width, classes = size
    read = (anomalies * choices * (width + 1) + classes * HELD * width) * dtype.itemsize
    return read + (anomalies + classes * HELD) * 8 + anomalies * (8 + 4)


def eager(
    candidates: Tensor, scores: Tensor, qualified: Tensor, classes: Tensor, qualified_classes: Tensor
) -> DiversePick:
    """The loop over anomalies, as published: cosines to all that the class holds, the smallest of the largest."""
    units, pool = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (candidates, qualified))
    held = {label: pool[qualified_classes == label] for label in qualified_classes.unique().tolist()}
    index, similarity = torch.empty_like(classes), units.new_empty(len(classes))
    for anomaly, label in enumerate(classes.tolist()):
        similarity[anomaly], index[anomaly] = (units[anomaly] @ held[label].T).amax(-1).min(-1)
        held[label] = torch.cat([held[label], units[anomaly, index[anomaly]].unsqueeze(0)])
    return DiversePick(index, similarity)


def stepwise(
    candidates: Tensor, scores: Tensor, qualified: Tensor, classes: Tensor, qualified_classes: Tensor
) -> DiversePick:
    """All classes at once, a step for each turn of them; winners go into places kept free in one table."""
    units, pool = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (candidates, qualified))
    labels, classes_at = qualified_classes.unique(return_inverse=True)
    order = classes.argsort(stable=True)
    label = torch.searchsorted(labels, classes)
    counts, held = label.bincount(minlength=len(labels)), classes_at.bincount(minlength=len(labels))
    turn = torch.arange(len(classes), device=classes.device) - (counts.cumsum(0) - counts)[label[order]]
    table = units.new_zeros(len(labels), int((counts + held).max()), units.shape[-1])
    where = classes_at.argsort(stable=True)
    place = torch.arange(len(where), device=where.device) - (held.cumsum(0) - held)[classes_at[where]]
    table[classes_at[where], place] = pool[where]
    free = torch.arange(table.shape[1], device=table.device) >= held.unsqueeze(1)
    index, similarity = torch.empty_like(classes), units.new_empty(len(classes))
    for step in range(int(counts.max()) if len(classes) else 0):
        now = order[turn == step]
        own = label[now]
        cosines = torch.bmm(units[now], table[own].mT).masked_fill(free[own].unsqueeze(1), -2)
        similarity[now], index[now] = cosines.amax(-1).min(-1)
        table[own, held[own] + step] = units[now, index[now]]
        free[own, held[own] + step] = False
    return DiversePick(index, similarity)


BENCH = Bench(
    name="diverse_pick",
    axes=("A", "K", "D", "G"),
    sizes=dict.fromkeys(("cpu", "cuda"), ((1000, 10, 512, 20), (5000, 10, 512, 100))),
    inputs=inputs,
    moved=moved,
    reference=diverse_pick_reference,
    # torch.compile is no provider: the held set changes its shape in each of a thousand turns
    providers={
        "tadperf": Provider("tadperf", lambda: diverse_pick),
        "eager": Provider("eager", lambda: eager),
        "eager-stepwise": Provider("eager", lambda: stepwise),
    },
    tolerance={"similarity": (1e-4, 1e-5)},
)
