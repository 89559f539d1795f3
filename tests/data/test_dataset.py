from __future__ import annotations

import pytest
import torch

from tadperf.data.dataset import Dataset
from tadperf.errors import UserError


def make_dataset(labels, names=("a", "b")):
    count = len(labels)
    images = torch.arange(count * 4).view(count, 1, 2, 2).to(torch.uint8)
    return Dataset(images, torch.tensor(labels, dtype=torch.int64), names, "made-up")


def test_subset_carries_the_clean_labels():
    dataset = make_dataset([0, 1, 0]).with_labels(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 0]))
    part = dataset.subset(torch.tensor([2, 0]))
    assert part.labels.tolist() == [0, 1]
    assert part.clean_labels is not None
    assert part.clean_labels.tolist() == [0, 0]
    assert torch.equal(part.images, dataset.images[[2, 0]])
    assert (len(part), part.num_classes, part.shape) == (2, 2, (1, 2, 2))


def test_fingerprint_depends_on_images_labels_and_names_but_not_on_clean_labels():
    dataset = make_dataset([0, 1, 0])
    same = make_dataset([0, 1, 0]).with_labels(dataset.labels, torch.tensor([1, 1, 1]))
    assert same.fingerprint == dataset.fingerprint
    others = [make_dataset([1, 1, 0]), make_dataset([0, 1, 0], ("a", "c")), dataset.subset(torch.tensor([2, 1, 0]))]
    assert len({dataset.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_a_set_is_shown_in_one_line():
    dataset = Dataset(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), ("a", "b"), "tiny")
    assert repr(dataset) == "Dataset(tiny: 3 images of 1 x 2 x 2, 2 classes)"


@pytest.mark.parametrize(
    ("labels", "words"), [([0, 2], r"label: 2: must be in 0\.\.1"), ([-1, 0], "label: -1"), ([], "no image")]
)
def test_errors(labels, words):
    with pytest.raises(UserError, match=words):
        make_dataset(labels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.zeros(3, 1, 2, 2)}, r"images: float32 \[3, 1, 2, 2\]: must be uint8"),
        ({"images": torch.zeros(3, 2, 2, dtype=torch.uint8)}, r"images: uint8 \[3, 2, 2\]: must be uint8"),
        ({"labels": torch.zeros(3)}, r"labels: float32 \[3\]: must be int64 \[3\]"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels: int64 \[2\]: must be int64 \[3\]"),
        ({"clean_labels": torch.zeros(4, dtype=torch.int64)}, r"clean_labels: int64 \[4\]: must be int64 \[3\]"),
    ],
)
def test_tensors_of_another_type_or_shape_are_refused(change, words):
    values = {"images": torch.zeros(3, 1, 2, 2, dtype=torch.uint8), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(UserError, match=words):
        Dataset(**{**values, **change}, class_names=("a", "b"), name="made-up")
