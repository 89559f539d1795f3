"""Held-out samples, and the samples that synthetic images start from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from tadperf.compute.work_progress import counting, work
from tadperf.data.pick import hold_out, pick_central, pick_real


@given(st.lists(st.integers(0, 4), min_size=1, max_size=120), st.floats(0.01, 0.49), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_held_out_samples_are_a_share_of_every_class(given_labels, share, seed):
    labels = torch.tensor(given_labels)
    kept, held_out = hold_out(labels, share, seed)
    assert sorted(kept.tolist() + held_out.tolist()) == list(range(len(labels)))  # disjoint and complete
    assert torch.equal(kept, kept.sort().values)
    assert torch.equal(held_out, held_out.sort().values)
    for label in labels.unique():
        size, held = int((labels == label).sum()), int((labels[held_out] == label).sum())
        assert held == min(round(share * size), size - 1)
        assert held < size
    assert all(torch.equal(a, b) for a, b in zip(hold_out(labels, share, seed), (kept, held_out), strict=True))


def test_another_seed_holds_out_other_samples():
    labels = torch.arange(200) % 4
    assert not torch.equal(hold_out(labels, 0.1, 0)[1], hold_out(labels, 0.1, 1)[1])
    assert len(hold_out(labels, 0.1, 0)[1]) == 20


def test_random_real_samples():
    labels = torch.arange(60).flip(0) % 3
    index = pick_real(labels, 4, torch.Generator().manual_seed(0))
    assert labels[index].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(index.unique()) == 12
    assert torch.equal(pick_real(labels, 4, torch.Generator().manual_seed(0)), index)
    assert not torch.equal(pick_real(labels, 4, torch.Generator().manual_seed(1)), index)


@pytest.mark.parametrize("ipc", [1, 3, 10])
def test_central_samples_are_the_nearest_to_the_centres_of_scikit_learn(ipc):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(90, 2, 3, 3, generator=generator), torch.arange(90) % 3
    index = pick_central(images, labels, ipc, seed=5)
    assert labels[index].tolist() == [0] * ipc + [1] * ipc + [2] * ipc
    assert len(index.unique()) == 3 * ipc
    assert torch.equal(pick_central(images, labels, ipc, seed=5), index)
    for label in range(3):
        rows = np.flatnonzero(labels.numpy() == label)
        points = images[rows].flatten(1).numpy()
        picked = [int(np.flatnonzero(rows == k)[0]) for k in index[label * ipc : (label + 1) * ipc].tolist()]
        centres = KMeans(ipc, n_init=3, random_state=5).fit(points).cluster_centers_  # pyright: ignore
        for k, centre in enumerate(centres):
            distance = np.sqrt(((points - centre) ** 2).sum(1))
            distance[picked[:k]] = np.inf  # samples of earlier centres
            assert distance[picked[k]] <= distance.min() + 1e-5  # two samples around their own centre are equally near


def test_central_samples_are_distinct_when_all_images_are_equal():
    images, labels = torch.zeros(12, 1, 2, 2), torch.arange(12) % 2
    with pytest.warns(match="distinct clusters"):
        index = pick_central(images, labels, 5, seed=0)
    assert len(index.unique()) == 10


def test_the_progress_of_clustering_counts_the_samples_of_each_class():
    labels, units = torch.tensor([0, 0, 1, -1, 1, 1]), []
    with counting(units.append):
        pick_central(torch.randn(6, 1, 2, 2), labels, 1, 0)
    assert units == [work(2), work(3)]
