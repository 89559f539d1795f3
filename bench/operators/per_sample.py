"""Compares tadperf.kernels.per_sample with eager PyTorch, torch.compile and cleanlab: `tadperf bench per_sample`.

Computes all five results on random logits; cleanlab gives only the loss.
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
    """Bytes: reads logits and int64 labels, writes four floats and an int64."""
    rows, classes = size
    return rows * (classes * dtype.itemsize + 8 + 4 * 4 + 8)


def eager(logits: Tensor, labels: Tensor) -> PerSample:
    """The usual PyTorch code. It does not treat NaN, infinities, ties and -1 as the reference does."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    p = log_p.exp()
    top, index = p.topk(2, -1)
    loss = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return PerSample(loss, top[:, 0], index[:, 0], top[:, 0] - top[:, 1], -(p * log_p).sum(-1))


def max_twice(logits: Tensor, labels: Tensor) -> PerSample:
    """Computes the same without topk, which Inductor leaves to eager: masks the maximum to find the second one."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    p = log_p.exp()
    top, index = p.max(-1)
    classes = torch.arange(p.shape[1], device=p.device)
    second = p.masked_fill(classes == index.unsqueeze(-1), -1).amax(-1)
    loss = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return PerSample(loss, top, index, top - second, -(p * log_p).sum(-1))


def cleanlab() -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """cleanlab's label quality "self_confidence": the probability of the given label, so the loss is -log of it."""
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
