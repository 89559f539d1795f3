from __future__ import annotations

import pytest
import torch

from tadperf.data.dataset import Dataset
from tadperf.errors import UserError


def made_up(labels, names=("a", "b")):
    count = len(labels)
    images = torch.arange(count * 4).view(count, 1, 2, 2).to(torch.uint8)
    return Dataset(images, torch.tensor(labels, dtype=torch.int64), names, "made-up")


def test_subset_carries_the_clean_labels():
    dataset = made_up([0, 1, 0]).with_labels(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 0]))
    part = dataset.subset(torch.tensor([2, 0]))
    assert part.labels.tolist() == [0, 1]
    assert part.clean_labels is not None
    assert part.clean_labels.tolist() == [0, 0]
    assert torch.equal(part.images, dataset.images[[2, 0]])
    assert (len(part), part.num_classes, part.shape) == (2, 2, (1, 2, 2))


def test_fingerprint_sees_images_labels_and_names_but_not_the_truth():
    dataset = made_up([0, 1, 0])
    same = made_up([0, 1, 0]).with_labels(dataset.labels, torch.tensor([1, 1, 1]))
    assert same.fingerprint == dataset.fingerprint
    others = [made_up([1, 1, 0]), made_up([0, 1, 0], ("a", "c")), dataset.subset(torch.tensor([2, 1, 0]))]
    assert len({dataset.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize(
    ("labels", "words"), [([0, 2], r"label: 2: must be in 0\.\.1"), ([-1, 0], "label: -1"), ([], "no image")]
)
def test_errors(labels, words):
    with pytest.raises(UserError, match=words):
        made_up(labels)
