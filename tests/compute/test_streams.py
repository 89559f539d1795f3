"""Tasks in parts, on a CPU. tests/cuda/test_side_by_side.py runs them on streams of the twin of a CUDA device."""

from __future__ import annotations

from collections.abc import Generator

import torch

from tadperf.compute import streams


def parts(item: int) -> Generator[object, None, int]:
    total = item
    for _ in range(3):
        total += 1
        yield
    return total


def test_all_parts_of_a_task_run_and_its_result_is_returned():
    assert streams.run_to_end(parts(4)) == 7


def test_a_cpu_runs_whole_tasks():
    results = streams.run_in_parts(parts, range(5), torch.device("cpu"), 1, lambda total: total * 2)
    assert dict(results) == {item: 2 * (item + 3) for item in range(5)}


def test_networks_that_fill_a_gpu_run_alone():
    batch_of_256 = 256 * 128 * 32 * 32
    assert streams.streams_for(batch_of_256) == streams.STREAMS > 1
    assert streams.streams_for(batch_of_256 + 1) == 1
