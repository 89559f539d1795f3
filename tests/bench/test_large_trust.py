"""The large_trust study, on small data, finds the wrong labels with features of every dtype."""

from __future__ import annotations

import pytest
import torch

from tadperf.bench.studies import large_trust

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wrong_labels_are_found(dtype, monkeypatch):
    monkeypatch.setattr(large_trust, "CHUNK", 700)
    found = large_trust.measure(2000, 20, 33, dtype)
    assert found["view_accuracy"] > 0.99
    assert found["coverage"] > 0.95
