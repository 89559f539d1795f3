"""Times the partition and the recalibration on data as large as ImageNet.

Run `python -m tadperf.bench.studies.large_trust`. Losses and features are synthetic: each class is a cloud in D
dimensions, and a fifth of the labels is wrong. It prints the seconds of each part and the peak memory of the process,
which includes the features.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from tadperf.compute.versions import versions
from tadperf.trust.partition import partition
from tadperf.trust.recalibrate import fit_anchors, recalibrate

CHUNK = 1 << 16  # samples to generate at a time; not tuned
WRONG = 0.2  # share of wrong labels


def make(count: int, classes: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns features [N, D] with a length of about 1, given labels, true labels and losses [N]."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator) * width**-0.5
    clean = torch.arange(count) % classes
    wrong = torch.rand(count, generator=generator) < WRONG
    labels = torch.where(wrong, (clean + 1) % classes, clean)
    losses = torch.where(wrong, 4.0, 0.5) + torch.rand(count, generator=generator)
    features = torch.empty(count, width, dtype=dtype)
    for start in range(0, count, CHUNK):
        classes_here = clean[start : start + CHUNK]
        cloud = torch.randn(len(classes_here), width, generator=generator) * width**-0.5
        features[start : start + CHUNK] = centres[classes_here] + 0.7 * cloud
    return features, labels, clean, losses


def measure(count: int, classes: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """Returns seconds by part, peak memory in GB (2**30 bytes), and the shares of kept and of correct labels."""
    seconds = {}

    def timed(name: str, begun: float) -> None:
        seconds[name] = round(time.perf_counter() - begun, 2)

    begun = time.perf_counter()
    features, labels, clean, losses = make(count, classes, width, dtype)
    timed("make the data", begun)
    begun = time.perf_counter()
    split = partition(losses, labels, classes)
    timed("partition", begun)
    begun = time.perf_counter()
    candidate = torch.where(split.trusted, labels, (labels + classes - 1) % classes)
    inner = recalibrate(features, labels, split.trusted * split.posterior, candidate, candidate, split.trusted, classes)
    timed("recalibrate", begun)
    begun = time.perf_counter()
    fit_anchors(features, labels, split.trusted * split.posterior, classes)
    timed("of which anchors and covariance", begun)
    view = torch.where(split.trusted | inner.clear, candidate, -1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        **seconds,
        "peak_gb": round(peak, 2),
        "features_gb": round(features.nbytes / 2**30, 2),
        "coverage": float((view >= 0).double().mean()),
        "view_accuracy": float((view == clean)[view >= 0].double().mean()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_280_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    options = parser.parse_args(arguments)
    figures = measure(options.samples, options.classes, options.width, getattr(torch, options.dtype))
    print(f"{options.samples} samples, {options.classes} classes, {options.width} {options.dtype} features, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {versions()['torch']}")
    for name, value in figures.items():
        print(f"  {name.replace('_', ' '):32} {value:g}")


if __name__ == "__main__":
    main()
