"""Checks an installed wheel: the compiled part loads, and each instruction set of this machine gives the right numbers.

Usage: smoke_test.py, in an environment with the wheel and nothing else. cibuildwheel runs it on every wheel.
"""

from __future__ import annotations

import os
import sys

import torch

import tadperf.kernels as tk
from tadperf.kernels import native


def main() -> None:
    module = native.module()
    if module is None:
        sys.exit(f"the compiled part is missing: {native.reason()}")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, 10, generator=generator) * 3
    labels = torch.randint(10, (1000,), generator=generator)
    loss = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none").float()
    for isa in module.isas():
        os.environ["TADPERF_ISA"] = isa
        native.isa_index.cache_clear()
        result = tk.per_sample(logits, labels)
        torch.testing.assert_close(result.loss, loss)
        assert torch.equal(result.prediction, logits.argmax(1))
    print(f"{native.__file__}: {', '.join(module.isas())}; {native.thread_pool()}")


if __name__ == "__main__":
    main()
