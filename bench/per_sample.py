"""tadperf.kernels.per_sample against eager PyTorch and torch.compile: `python -m tadperf.bench.per_sample`.

All five outputs on random float32 logits. The three take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date

import numpy as np
import torch
from torch import Tensor

from tadperf.kernels import native, per_sample

SHAPES = ((50_000, 10), (50_000, 100), (100_000, 200), (20_000, 1000))


def eager(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """What one would write in PyTorch; without the reference's guards for NaN, infinities, ties and -1."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    top, index = p.topk(2, -1)
    loss = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return loss, top[:, 0], index[:, 0], top[:, 0] - top[:, 1], -(p * log_p).sum(-1)


def max_twice(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The same without topk, which Inductor leaves to eager: the second maximum with the first one masked."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    top, index = p.max(-1)
    classes = torch.arange(p.shape[1], device=p.device)
    second = p.masked_fill(classes == index.unsqueeze(-1), -1).amax(-1)
    loss = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return loss, top, index, top - second, -(p * log_p).sum(-1)


def interleaved(functions: Sequence[Callable[[], object]], repeats: int) -> np.ndarray:
    """Milliseconds [functions, repeats], the functions taking turns after two warm-up rounds."""
    times = np.empty((len(functions), repeats + 2))
    for turn in range(repeats + 2):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            times[i, turn] = (time.perf_counter() - start) * 1e3
    return times[:, 2:]


def measure(rows: int, classes: int, repeats: int) -> dict[str, np.ndarray]:
    """Milliseconds of every contender on one shape."""
    torch.manual_seed(0)
    logits, labels = torch.randn(rows, classes) * 3, torch.randint(classes, (rows,))
    contenders = {
        "tadperf": per_sample,
        "eager": eager,
        "compile": torch.compile(eager),
        "compile, no topk": torch.compile(max_twice),
    }
    with torch.inference_mode():
        times = interleaved([lambda f=f: f(logits, labels) for f in contenders.values()], repeats)
    return dict(zip(contenders, times, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    implementation = f"native ({native.isa()})" if native.available() else f"reference ({native.reason()})"
    print(date.today(), platform.machine(), f"{options.threads} threads", f"torch {torch.__version__}", implementation)
    print(f"{'N x C':>16}  {'':<16}  {'median ms':>9}  {'q20':>8}  {'q80':>8}  {'GB/s':>6}  {'times ours':>10}")
    for rows, classes in SHAPES:
        torch.compiler.reset()
        results = measure(rows, classes, options.repeats)
        ours = np.median(results["tadperf"])
        for name, times in results.items():
            q20, median, q80 = np.quantile(times, (0.2, 0.5, 0.8))
            shape, bandwidth = f"{rows} x {classes}", rows * classes * 4 / median / 1e6
            quantiles = f"{median:9.3f}  {q20:8.3f}  {q80:8.3f}"
            print(f"{shape:>16}  {name:<16}  {quantiles}  {bandwidth:6.1f}  {median / ours:10.1f}")


if __name__ == "__main__":
    main()
