"""Finds near duplicates: in the training images, and between training and test images.

Two images are exact duplicates if their pixels are equal. They are near duplicates if the cosine of their descriptors
is at least a threshold. The descriptor of an image is its pixels, reduced to 16 x 16 and centred, so the cosine is a
correlation of the two pictures. We do not use the features of the proxies: these networks learn to make all images of a
class equal. Mirrored images are not found.

The same cosine of the brightness alone must be at least 0.9: two blue skies differ from grey in the same way.

Figures: in the 50 000 training images of CIFAR-10, 46 pairs reach 0.98. Three of them show different skies, with a
cosine of the brightness of 0.63 to 0.78; the other 43 have 0.97 or more. With a threshold of 0.97, 3 of 40 images
that we looked at were skies. Of 600 crops of two photos, 98 % are found after JPEG at quality 75, and 86 % at quality
30. Very small images need a look: 43 of the 1797 digits of scikit-learn (8 x 8 pixels) have a neighbour at 0.98 from
another writer. 50 000 images of 32 x 32 take 41 s of CPU time.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.trust.neighbours import CPU_BLOCK, nearest_neighbours

THRESHOLD = 0.98  # cosine of two descriptors; figures at the top of this file
BRIGHTNESS_THRESHOLD = 0.9
FEATURE_THRESHOLD = 0.98  # cosine of two rows of features that the user gave; not tuned
SIDE = 16  # pixels; not tuned
NEIGHBOURS = 10  # of each sample that are compared
MIN_CONTRAST = (
    1.0  # standard deviation of the reduced pixels, of 255; a flatter image has no near duplicates, only exact
)
CHUNK = 4096  # images; bounds the memory


class Duplicates(NamedTuple):
    """Pairs of samples: first and second int64 [P], similarity float32 [P] in [0, 1], exact bool [P].

    first: a training sample. second: a later training sample, or for leaks a test sample. The similarity of an exact
    pair is 1.
    """

    first: Tensor
    second: Tensor
    similarity: Tensor
    exact: Tensor


def find_duplicates(images: Tensor | None, features: Tensor | None = None) -> Duplicates:
    """Finds the pairs of near duplicates in one set, the most similar first (tadperf; see the top of this module).

    images: uint8 [N, C, H, W], or None. features: floats [N, D] of the user, or None. With both, a pair needs one
    of them and gets the larger similarity. Of three or more exact copies, each is paired with the first one alone.
    Raises ValueError if both are None.
    """
    if images is None and features is None:
        raise ValueError("images, features: both are None: give one of them")
    rows = images if images is not None else features
    assert rows is not None
    codes = hash_rows(rows)
    exact = _exact_pairs(codes, codes)
    found = [exact]
    kinds = [(describe_images(images), THRESHOLD)] if images is not None else []
    kinds += [(features, FEATURE_THRESHOLD)] if features is not None else []
    for descriptors, threshold in kinds:
        index, z = _unique_rows(descriptors, codes)
        if len(index) < 2:
            continue
        similarity, neighbour = nearest_neighbours(z, min(NEIGHBOURS, len(index) - 1))
        near = _near_pairs(similarity, index[neighbour], index, threshold)
        if images is not None and descriptors is not features:
            near = _of_one_brightness(near, images, images)
        found.append(near)
    return _merge(found)


def find_leaks(images: Tensor, test: Tensor) -> Duplicates:
    """Finds pairs of a training image and a test image that are near duplicates, the most similar first (tadperf).

    images, test: uint8 [N, C, H, W] and [M, C, H, W]. A test image is paired with its most similar training image only.
    """
    codes, test_codes = hash_rows(images), hash_rows(test)
    exact = _exact_pairs(codes, test_codes, across=True)
    train, queries = describe_images(images), describe_images(test)
    similarity, neighbour = [], []
    for part in queries.split(max(1, CPU_BLOCK // len(train))):
        best = (part @ train.T).max(1)
        similarity.append(best.values)
        neighbour.append(best.indices)
    values, index = torch.cat(similarity), torch.cat(neighbour)
    near = values >= THRESHOLD
    near[exact.second] = False
    second = near.nonzero().squeeze(1)
    none = torch.zeros(len(second), dtype=torch.bool)
    similar = Duplicates(index[near], second, values[near].clamp(max=1), none)
    return _merge([exact, _of_one_brightness(similar, images, test)])


def describe_images(images: Tensor) -> Tensor:
    """Returns the descriptors of images, float32 [N, D] of length 1, or 0 for an image without contrast."""
    return torch.cat([_describe(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)])


def _describe(images: Tensor) -> Tensor:
    size = (min(SIDE, images.shape[2]), min(SIDE, images.shape[3]))
    z = F.adaptive_avg_pool2d(images.float(), size).flatten(1)
    z = z - z.mean(1, keepdim=True)
    flat = z.square().mean(1) < MIN_CONTRAST**2
    return F.normalize(z, dim=1).masked_fill(flat.unsqueeze(1), 0)


def _of_one_brightness(pairs: Duplicates, images: Tensor, others: Tensor) -> Duplicates:
    """Returns the pairs whose pictures also agree without colour."""
    kept = torch.zeros(len(pairs.first), dtype=torch.bool)
    for start in range(0, len(kept), CHUNK):
        rows = slice(start, start + CHUNK)
        first, second = images[pairs.first[rows]], others[pairs.second[rows]]
        grey = (_describe(split.float().mean(1, keepdim=True)) for split in (first, second))
        kept[rows] = torch.stack(list(grey)).prod(0).sum(1) >= BRIGHTNESS_THRESHOLD
    return Duplicates(*(values[kept] for values in pairs))


def hash_rows(values: Tensor) -> list[bytes]:
    """Returns a hash of each row of a tensor; rows with equal bytes have equal hashes."""
    codes: list[bytes] = []
    for start in range(0, len(values), CHUNK):
        rows = values[start : start + CHUNK].contiguous().flatten(1).view(torch.uint8).numpy()
        codes += [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]
    return codes


def _exact_pairs(codes: list[bytes], others: list[bytes], across: bool = False) -> Duplicates:
    """Pairs each of `others` with the first equal one of `codes`; within one set, only later samples get a pair."""
    place: dict[bytes, int] = {}
    for k, code in enumerate(codes):
        place.setdefault(code, k)
    pairs = [(place[code], k) for k, code in enumerate(others) if code in place and (across or place[code] != k)]
    first, second = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    return Duplicates(first, second, torch.ones(len(pairs)), torch.ones(len(pairs), dtype=torch.bool))


def _unique_rows(descriptors: Tensor, codes: list[bytes]) -> tuple[Tensor, Tensor]:
    """Returns index and descriptors without later exact copies. Many copies of an image would hide its neighbours."""
    first = {code: k for k, code in reversed(list(enumerate(codes)))}
    index = torch.tensor(sorted(first.values()))
    return index, descriptors[index].float()


def _near_pairs(similarity: Tensor, neighbour: Tensor, index: Tensor, threshold: float) -> Duplicates:
    """Returns the pairs at or above the threshold. similarity, neighbour: [M, k]; index: int64 [M]."""
    row, column = (similarity >= threshold).nonzero(as_tuple=True)
    a, b = index[row], neighbour[row, column]
    values = similarity[row, column].clamp(max=1).float()
    return Duplicates(torch.minimum(a, b), torch.maximum(a, b), values, torch.zeros(len(a), dtype=torch.bool))


def _merge(found: list[Duplicates]) -> Duplicates:
    """Joins lists of pairs: one entry for each pair, with its largest similarity; sorts by similarity."""
    first, second, similarity, exact = (torch.cat(values) for values in zip(*found, strict=True))
    width = int(second.max()) + 1 if len(second) else 1
    order = similarity.argsort(descending=True, stable=True)
    pair = (first * width + second)[order].tolist()
    seen: dict[int, int] = {}
    for place, code in enumerate(pair):
        seen.setdefault(code, place)
    kept = order[torch.tensor(list(seen.values()), dtype=torch.int64)]
    # Exact pairs first, then by similarity; equal ones in the order of the data.
    rank = sorted(kept.tolist(), key=lambda k: (not exact[k], -float(similarity[k]), int(first[k]), int(second[k])))
    kept = torch.tensor(rank, dtype=torch.int64)
    return Duplicates(first[kept], second[kept], similarity[kept], exact[kept])
