"""Derives an independent random stream for each purpose from the seed of a run."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *purpose: object) -> int:
    """Derives a 63-bit seed for one purpose of a run: equal arguments give the same seed on every machine.

    A step that derives its own stream draws the same values in a resumed run, because its draws depend only on its
    number and not on the state of a generator.
    """
    text = "/".join(map(str, (seed, *purpose))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """Returns a CPU generator for one purpose. Drawing on the CPU gives every device the same values."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *purpose))
