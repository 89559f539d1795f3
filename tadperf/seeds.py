"""One seed for a whole run, and from it an independent stream for every purpose."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose of a run: the same (seed, purpose) gives the same stream on every machine.

    Deriving a fresh stream per step, rather than carrying one generator's state along, is what makes a resumed run
    end in the same bytes as an undisturbed one: a step's draws depend on its number alone.
    """
    text = "/".join(map(str, (seed, *purpose))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose; draws are made on the CPU so that every device sees the same ones."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *purpose))
