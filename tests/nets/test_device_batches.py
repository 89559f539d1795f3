"""Batches whose position lies on the device. Here the device is the CPU; tests/cuda uses the twin of a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tadperf.nets import device_batches, training
from tadperf.nets.device_batches import DeviceBatches, DeviceDraws, batch_sizes, graph_steps
from tadperf.nets.training import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
FULL = "color_crop_cutout_flip_scale_rotate"


@pytest.mark.parametrize("strategy", ["none", "flip", FULL])
@pytest.mark.parametrize(("count", "batch"), [(12, 5), (12, 12), (7, 100)])
def test_the_batches_are_those_of_the_training_on_a_cpu(strategy, count, batch):
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(5, batch, 0.1, 0.0, 0.0, strategy)
    expected = [list(parts) for parts in training.epochs(images, recipe, 3, CPU)]
    source, sizes = DeviceBatches(images, CPU), batch_sizes(count, batch)
    for parts, (_, draws) in zip(expected, training.draw_epochs(recipe, count, 8, 3, 1), strict=True):
        source.load(draws)
        for size, (index, x) in zip(sizes, parts, strict=True):
            ours = source.next_batch(size)
            assert torch.equal(ours[0], index)
            torch.testing.assert_close(ours[1], x, rtol=1e-5, atol=1e-5)


def test_the_rows_of_every_tensor_start_at_a_multiple_of_16_bytes():
    draws = {"a": torch.arange(12.0).view(4, 3), "b": (None, torch.arange(4)), "c": torch.randn(4, 2, 1)}
    source = DeviceDraws[dict[str, Any]](CPU)
    for _ in range(2):
        source.load(draws)
        for start, size in ((0, 3), (3, 1)):
            rows, stop = source.next_rows(size), start + size
            assert torch.equal(rows["a"], draws["a"][start:stop])
            assert rows["b"][0] is None
            assert torch.equal(rows["b"][1], draws["b"][1][start:stop])
            assert torch.equal(rows["c"], draws["c"][start:stop])
            for tensor in (rows["a"], rows["b"][1], rows["c"]):
                assert tensor.is_contiguous()
                assert tensor.storage_offset() * tensor.element_size() % 16 == 0
        draws = {"a": draws["a"] + 1, "b": (None, draws["b"][1] + 1), "c": draws["c"] + 1}


def test_steps_are_cut_into_graphs_of_the_same_number(monkeypatch):
    monkeypatch.setattr(device_batches, "STEPS_PER_GRAPH", 3)
    assert batch_sizes(12, 5) == [5, 5, 2]
    assert list(graph_steps(batch_sizes(12, 5))) == [(5, 5, 2)]
    assert list(graph_steps([4] * 7)) == [(4, 4, 4), (4, 4, 4), (4,)]
    assert list(graph_steps([])) == []


@pytest.mark.parametrize("every_epoch", [False, True])
def test_epochs_of_one_learning_rate_run_without_a_pause(every_epoch):
    recipe = Recipe(9, 4, 0.1, 0.0, 0.0, "none")
    spans = list(training._spans(recipe, 2, 9, every_epoch))
    assert spans == ([[e] for e in range(2, 9)] if every_epoch else [[2, 3, 4], [5, 6, 7, 8]])
    assert [len({recipe.rate(epoch) for epoch in span}) for span in spans] == [1] * len(spans)


def test_new_draws_use_the_same_memory():
    """A recorded graph reads this memory at each replay."""
    images, recipe = torch.randn(4, 1, 8, 8), Recipe(2, 4, 0.1, 0.0, 0.0, FULL)
    (_, one), (_, two) = training.draw_epochs(recipe, 4, 8, 0, 1)
    source = DeviceBatches(images, CPU)
    addresses = []
    for draws in (one, two):
        source.load(draws)
        memory = source._draws._memory
        assert memory is not None
        addresses.append([tensor.data_ptr() for tensor in memory.tensors])
        assert torch.equal(source.next_batch(4)[0], draws.order)
    assert addresses[0] == addresses[1]
    assert not torch.equal(one.order, two.order)
