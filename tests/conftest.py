"""Settings and fixtures for all tests."""

from __future__ import annotations

import os

import pytest
import torch

# pytest runs one process per core, so each process, and every process that a test starts, uses one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def one_thread():
    """Runs PyTorch on one thread: on tensors of a few kilobytes a second thread only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
