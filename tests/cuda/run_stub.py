"""Runs a script while PyTorch sees one CUDA device that has no memory: python tests/cuda/run_stub.py script.py ...

For programs on the CPU of a machine with a GPU, and for fake tensors.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import stub

if __name__ == "__main__":
    stub.load()
    import torch

    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    torch.cuda._lazy_init = lambda: None
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
