"""tadperf.kernels.per_sample against eager PyTorch, torch.compile and cleanlab: `tadperf bench per_sample`.

All five results on random logits; cleanlab gives the loss alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tadperf.bench.operators.engine import Bench, Provider, Size, plain
from tadperf.kernels import PerSample, per_sample, per_sample_reference


def inputs(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    rows, classes = size
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(rows, classes, device=device, generator=generator, dtype=dtype).mul_(3)
    return logits, torch.randint(classes, (rows,), device=device, generator=generator)


def moved(size: Size, dtype: torch.dtype) -> int:
    """Logits and int64 labels read; four floats and an int64 written."""
    rows, classes = size
    return rows * (classes * dtype.itemsize + 8 + 4 * 4 + 8)


def eager(logits: Tensor, labels: Tensor) -> PerSample:
    """What one would write in PyTorch; without the reference's guards for NaN, infinities, ties and -1."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    p = log_p.exp()
    top, index = p.topk(2, -1)
    loss = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return PerSample(loss, top[:, 0], index[:, 0], top[:, 0] - top[:, 1], -(p * log_p).sum(-1))


def max_twice(logits: Tensor, labels: Tensor) -> PerSample:
    """The same without topk, which Inductor leaves to eager: the second maximum with the first one masked."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    p = log_p.exp()
    top, index = p.max(-1)
    classes = torch.arange(p.shape[1], device=p.device)
    second = p.masked_fill(classes == index.unsqueeze(-1), -1).amax(-1)
    loss = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return PerSample(loss, top, index, top - second, -(p * log_p).sum(-1))


def cleanlab() -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """Its label quality "self_confidence", the probability of the given label: the loss by another name."""
    from cleanlab.rank import get_label_quality_scores  # pyright: ignore[reportMissingImports]

    def scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        p = logits.float().softmax(-1)
        quality = get_label_quality_scores(labels.numpy(), p.numpy(), method="self_confidence", adjust_pred_probs=False)
        return {"loss": -torch.from_numpy(quality).log()}

    return scores


BENCH = Bench(
    name="per_sample",
    axes=("N", "C"),
    sizes={
        "cpu": ((50_000, 10), (50_000, 100), (100_000, 200), (20_000, 1000)),
        "cuda": ((50_000, 10), (1_000_000, 100), (1_280_000, 1000)),
    },
    inputs=inputs,
    moved=moved,
    reference=per_sample_reference,
    providers={
        "tadperf": Provider("tadperf", lambda: per_sample),
        **plain({"": eager, "max": max_twice}),
        "cleanlab": Provider("peer", cleanlab, package="cleanlab", limit=2**27),
    },
    tolerance=dict.fromkeys(("loss", "confidence", "margin", "entropy"), (1e-4, 1e-5)),
)
