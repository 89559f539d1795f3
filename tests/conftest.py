"""For all tests."""

from __future__ import annotations

import os

import pytest
import torch

# One process for each core and one thread in each, also in what a test starts: more would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def one_thread():
    """One thread for PyTorch: on tensors of a few kilobytes a second one only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
