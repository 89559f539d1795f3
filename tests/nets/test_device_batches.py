"""Batches whose position lies on the device. Here the device is the CPU; tests/cuda uses the twin of a CUDA device."""

from __future__ import annotations

import pytest
import torch

from tadperf.nets import training
from tadperf.nets.device_batches import DeviceBatches
from tadperf.nets.training import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
FULL = "color_crop_cutout_flip_scale_rotate"


@pytest.mark.parametrize("strategy", ["none", "flip", FULL])
@pytest.mark.parametrize(("count", "batch"), [(12, 5), (12, 12), (7, 100)])
@pytest.mark.parametrize("draws_at_once", [1, 30, 1 << 14])
def test_the_batches_are_those_of_the_training_on_a_cpu(strategy, count, batch, draws_at_once, monkeypatch):
    monkeypatch.setattr(training, "DEVICE_DRAWS", draws_at_once)
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(5, batch, 0.1, 0.0, 0.0, strategy)
    expected = [list(parts) for parts in training.epochs(images, recipe, 3, CPU)]
    next_batch, passes = training.epochs_on_device(images, recipe, 3, CPU)
    sizes_of_epochs = []
    for epoch, sizes in enumerate(passes):
        sizes_of_epochs.append(sizes)
        for (size,), (index, x) in zip(sizes, expected[epoch], strict=True):
            ours = next_batch(size)
            assert torch.equal(ours[0], index)
            torch.testing.assert_close(ours[1], x, rtol=1e-5, atol=1e-5)
    assert len(sizes_of_epochs) == 5
    assert [size for (size,) in sizes_of_epochs[0]] == [len(index) for index, _ in expected[0]]


def test_new_draws_use_the_same_memory():
    """A recorded graph reads this memory at each replay."""
    images, recipe = torch.randn(4, 1, 8, 8), Recipe(2, 4, 0.1, 0.0, 0.0, FULL)
    (_, one), (_, two) = training.draw_epochs(recipe, 4, 8, 0, 1)
    source = DeviceBatches(images, 4, CPU)
    orders = []
    for draws in (one, two):
        source.load(draws)
        assert source._draws is not None
        orders.append([tensor.data_ptr() for tensor in source._draws.tensors()])
        assert torch.equal(source.next_batch(4)[0], draws.order)
    assert orders[0] == orders[1]
    assert not torch.equal(one.order, two.order)
