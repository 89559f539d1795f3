"""The audit of a million made-up features: time, peak memory, recall of the neighbours, and average precision.

Run `python -m tadperf.bench.studies.large_audit [--samples N] [--classes C] [--width D] [--noise S]`. The features are
written to a float16 file first (1.3 GB for the default) and read from there; the time of that is not measured. Each
class is a Gaussian cloud with clouds of five kinds in it; 20 % of the labels are wrong. With --exact N the audit of N
samples is compared with the one that holds all probabilities and the exact neighbours.

--noise is the deviation S of a sample from its cloud in each dimension. The mean cosine of two samples of a class is
1.098 / (1.49 + S^2); between classes it is 0 +- D^-0.5. Measured with 150 000 samples of 512 features in 1000 classes,
for S of 1, 2 and 3: 0.44, 0.20 and 0.10 within a class, 0.00 +- 0.04 between; 100, 100 and 66 % of the 10 nearest
samples have the same class.
"""

from __future__ import annotations

import argparse
import logging
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor

from tadperf import seeds
from tadperf.trust import large_audit, top_classes
from tadperf.trust.evidence import audit_labels
from tadperf.trust.state import TrustState

WRONG = 0.2
KINDS = 5  # clouds in a class
BLOCK = 2**14


def make_features(file: Path, samples: int, classes: int, width: int, noise: float) -> tuple[Tensor, Tensor]:
    """Writes float16 features [N, D] to a .npy file. Returns the true classes and the given labels, int64 [N]."""
    generator = seeds.generator(0, "features")
    centres = torch.randn(classes, width, generator=generator)
    kinds = 0.7 * torch.randn(classes * KINDS, width, generator=generator)
    true = torch.randint(0, classes, (samples,), generator=generator)
    features = np.lib.format.open_memmap(file, "w+", np.float16, (samples, width))
    for start in range(0, samples, BLOCK):
        rows = true[start : start + BLOCK]
        kind = rows * KINDS + torch.randint(0, KINDS, rows.shape, generator=generator)
        deviation = noise * torch.randn(len(rows), width, generator=generator)
        features[start : start + BLOCK] = (centres[rows] + kinds[kind] + deviation).half().numpy()
    features.flush()
    wrong = torch.rand(samples, generator=generator) < WRONG
    other = (true + torch.randint(1, classes, (samples,), generator=generator)) % classes
    return true, torch.where(wrong, other, true)


def figures(state: TrustState, true: Tensor) -> str:
    wrong = state.given != true
    right = (state.suggested == true)[state.issues & wrong].float().mean()
    precision = average_precision_score(wrong, state.score)
    return f"AP {precision:.4f}, F1 {f1_score(wrong, state.issues):.4f}, right suggestions {right:.4f}"


def run(file: Path, given: Tensor, true: Tensor, classes: int) -> None:
    features = torch.from_numpy(np.load(file, mmap_mode="c"))[: len(given)]
    start, cpu = time.perf_counter(), time.process_time()
    state = audit_labels(given, None, features, [str(k) for k in range(classes)])
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{len(given)} samples: {seconds:.0f} s, {cpu:.0f} CPU s, peak {peak:.2f} GB, {figures(state, true)}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_280_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--noise", type=float, default=3.0, help="deviation of a sample in each dimension")
    parser.add_argument("--exact", type=int, default=0, help="also audit this number of samples exactly")
    parser.add_argument("--folder", type=Path, help="a place for the features; by default a temporary folder")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the recall of the neighbours
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder) / "features.npy"
        print(f"{options.classes} classes, {options.width} features, noise {options.noise:g}", flush=True)
        true, given = make_features(file, options.samples, options.classes, options.width, options.noise)
        if options.exact:
            part = slice(0, options.exact)
            for name, large, approximate in (("exact", 2**62, 2**62), ("blocks", 0, 2**62), ("blocks, faiss", 0, 0)):
                top_classes.LARGE, large_audit.APPROXIMATE = large, approximate
                print(name, end=": ", flush=True)
                run(file, given[part], true[part], options.classes)
        else:
            run(file, given, true, options.classes)


if __name__ == "__main__":
    main()
