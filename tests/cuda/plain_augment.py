"""The augmentation in plain PyTorch on the twin, as without Triton: its matrix products, and the results of a CPU.

python tests/cuda/run_twin.py tests/cuda/plain_augment.py
"""

from __future__ import annotations

import json
from typing import Any

import torch
from counters import LAUNCH, counters

from tadperf.data import augment
from tadperf.kernels import gpu

STRATEGY, SHAPE = "color_crop_cutout_flip_scale_rotate", (12, 3, 9, 9)
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "affine_grid_generator")


def measure() -> dict[str, Any]:
    gpu.available = lambda: False
    generator = torch.Generator().manual_seed(0)
    drawn = augment.draw(STRATEGY, SHAPE[0], SHAPE[3], generator)
    x, grad = torch.randn(2, *SHAPE, generator=generator)
    expected, adjoint = augment.apply_with_adjoint(x, drawn)
    counters.reset()
    found, adjoint_on_device = augment.apply_with_adjoint(x.cuda(), drawn)
    pairs = (found, expected), (adjoint_on_device(grad.cuda()), adjoint(grad))
    operators = [line.rpartition("[")[2].rstrip("]") for line in counters.lines[LAUNCH]]
    return {
        "errors": [float((a.cpu() - b).norm() / b.norm()) for a, b in pairs],
        "products": [name for name in operators if name in PRODUCTS],
        "launches": len(operators),
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
