"""For all tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def one_thread():
    """One thread for PyTorch: on tensors of a few kilobytes a second one only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
