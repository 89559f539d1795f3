"""Makes a test split where a set has none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tadperf import seeds
from tadperf.data import mapped
from tadperf.data.dataset import Dataset
from tadperf.data.labels import count_labels, replace_labels
from tadperf.errors import UserError, warn_user

BLOCK = 1024  # images copied at a time; not tuned


def split_off_test(whole: Dataset, share: float, labels: str | None = None) -> tuple[Dataset, Dataset]:
    """Divides a set into a train and a test split. Says so in a warning.

    The test split holds `share` of each class, at least one sample of a class of two or more. The draw depends on the
    labels of the set alone, not on the seed of a run: all runs are measured on the same samples.
    labels: a file for `replace_labels`, with a label for each sample of the set or of the train split. A test sample
    has its clean label if that is known.
    Raises UserError if nothing can be drawn, and as `replace_labels` does.
    """
    drawn = draw_test_rows(whole.labels, share)
    if not drawn.any():
        raise UserError("data", whole.source.get("path", whole.name), "has too few images for a test split; add some")
    part = f"{int(drawn.sum())} of {len(whole)} images ({100 * share:.3g} % of each class, data.test_share)"
    wrong = "" if whole.clean_labels is not None else "; its labels may be wrong, which makes accuracies too low"
    warn_user(f"data: {whole.name}: has no test split; {part} are drawn as the test split{wrong}")
    whole = replace(whole, source={**whole.source, "test_share": share})
    if labels is not None and count_labels(labels) > int((~drawn).sum()) + 1:  # one row may be the header
        whole = replace_labels(whole, labels)
        drawn = drawn if whole.rows is None else _by_row(drawn, whole)
        labels = None
    train, test = (_part(whole, mask, share) for mask in (~drawn, drawn))
    if labels is not None:
        train = replace_labels(train, labels)
    test = replace(test, source={**test.source, "split": "test"}, broken=())  # train lists the broken images of the set
    return train, test if test.clean_labels is None else test.with_labels(test.clean_labels, None)


def draw_test_rows(labels: Tensor, share: float) -> Tensor:
    """Returns which samples are drawn, bool [N]. labels: int64 [N]."""
    generator = seeds.generator(0, "test split")
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        drawn[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return drawn


def _by_row(drawn: Tensor, left: Dataset) -> Tensor:
    """Returns which of the samples that are left are drawn. drawn: bool, without the broken images."""
    assert left.rows is not None
    opened = torch.zeros(left.opened, dtype=torch.bool)
    broken = torch.zeros(left.opened, dtype=torch.bool)
    broken[[image.row for image in left.broken]] = True
    opened[~broken] = drawn
    return opened[left.rows]


def _part(whole: Dataset, mask: Tensor, share: float) -> Dataset:
    """Returns the samples of a mask. A large part goes into a mapped file, not into memory."""
    index = mask.nonzero()[:, 0]
    shape = (len(index), *whole.shape)
    if not mapped.is_large(shape):
        return whole.subset(index)

    def fill(pixels: np.ndarray) -> int:
        for start in range(0, len(index), BLOCK):
            pixels[start : start + BLOCK] = whole.images[index[start : start + BLOCK]].numpy()
        return pixels.shape[1]

    images = mapped.fill_images(shape, mapped.cache_name([], "part", whole.fingerprint, share, len(index)), fill)
    without_pixels = replace(whole, images=whole.images.new_zeros(1, 1, 1, 1).expand(len(whole), -1, -1, -1))
    return replace(without_pixels.subset(index), images=images)
