"""Images inside the page, as data URIs, within a limit of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from tadperf.report.drawing import to_drawable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tadperf.trust.state import TrustState

LONGER_SIDE = 128  # pixels to which a large image is reduced; the page shows it at 64 to 96
JPEG_QUALITY = 85
# No constant below was tuned. Together with the text the page stays below 3 MB.
SUSPECT_BYTES, DISTILLED_BYTES = 1_200_000, 1_000_000
MAX_GROUPS = 40  # pairs of given and suggested label with images
MAX_SUSPECTS = 240  # suspect images in all pairs together
MIN_IN_GROUP, MAX_IN_GROUP = 4, 24
MAX_DISTILLED = 600
MAX_PAIRS, PAIR_BYTES = 40, 400_000  # near duplicates


class Suspect(NamedTuple):
    """A suspected label error; `uri` is "" if the page has no room for its image, or if there is none."""

    sample: int
    score: float
    verdict: int
    uri: str


class Group(NamedTuple):
    """The suspected errors with one given and one suggested label; `samples` holds the worst of `total`."""

    given: int
    suggested: int
    total: int
    samples: list[Suspect]


class ByteBudget:
    """Counts the bytes of the data URIs of a section."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def uri(self, pixels: np.ndarray) -> str:
        """Returns the data URI of an image uint8 [H, W] or [H, W, 3], or "" if it does not fit."""
        uri = data_uri(pixels)
        if len(uri) > self.left:
            return ""
        self.left -= len(uri)
        return uri


def data_uri(pixels: np.ndarray) -> str:
    """Returns an image uint8 [H, W] or [H, W, 3] as a data URI: PNG or JPEG, the shorter one.

    Reduces an image with a side above 128 pixels.
    """
    from PIL import Image

    image = Image.fromarray(pixels)
    if max(image.size) > LONGER_SIDE:
        ratio = LONGER_SIDE / max(image.size)
        size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
        image = image.resize(size, Image.Resampling.BOX)
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    kind, data = min((("png", png.getvalue()), ("jpeg", jpeg.getvalue())), key=lambda option: len(option[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def suspect_groups(state: TrustState, images: Tensor | None) -> list[Group]:
    """Returns the suspected errors by confusion, the most frequent first; in a group the highest score first.

    images: uint8 [N, C, H, W], or None for a set without images. Later groups get no images if the bytes are spent.
    """
    order = state.worst()
    order = order[state.issues[order]]
    classes = len(state.class_names)
    pair = state.given[order] * classes + state.suggested[order]
    pairs, counts = pair.unique(return_counts=True)
    largest = counts.argsort(descending=True, stable=True)
    shown = largest[:MAX_GROUPS].tolist()
    most = max(MIN_IN_GROUP, min(MAX_IN_GROUP, MAX_SUSPECTS // max(len(shown), 1)))
    budget, groups = ByteBudget(SUSPECT_BYTES), []
    for place in shown:
        code, count = int(pairs[place]), int(counts[place])
        worst = order[pair == code][:most]
        drawable = [None] * len(worst) if images is None else to_drawable(images[worst])
        samples = [
            Suspect(index, float(state.score[index]), int(state.verdict[index]), "" if x is None else budget.uri(x))
            for index, x in zip(worst.tolist(), drawable, strict=True)
        ]
        groups.append(Group(code // classes, code % classes, count, samples))
    return groups


def pair_uris(
    pairs: Sequence[tuple[int, int, bool]], train: Tensor | None, test: Tensor | None
) -> list[tuple[str, str]]:
    """Returns the data URIs of the first pairs of near duplicates, "" where there is no image or no room.

    pairs: both samples, and whether the second one is in `test`. train, test: uint8 [N, C, H, W] each.
    """
    budget, uris = ByteBudget(PAIR_BYTES), []
    for first, second, in_test in pairs[:MAX_PAIRS]:
        others = test if in_test else train
        if train is None or others is None:
            uris.append(("", ""))
        else:
            uris.append((budget.uri(to_drawable(train[[first]])[0]), budget.uri(to_drawable(others[[second]])[0])))
    return uris


def distilled_rows(pixels: Tensor, labels: Tensor, num_classes: int) -> list[tuple[int, int, list[str]]]:
    """Returns for each class that is shown: its number, its number of images, and the data URIs of the first ones.

    pixels: uint8 [M, C, H, W]. labels: int64 [M]. Every class gets its first image before any class gets a second one.
    """
    by_class = [(labels == c).nonzero()[:, 0] for c in range(min(num_classes, MAX_DISTILLED))]
    rows = [(c, len(index), list[str]()) for c, index in enumerate(by_class)]
    budget, total = ByteBudget(DISTILLED_BYTES), 0
    for rank in range(max((len(index) for index in by_class), default=0)):
        selected = [c for c, index in enumerate(by_class) if rank < len(index)][: MAX_DISTILLED - total]
        if not selected:
            break
        drawable = to_drawable(pixels[torch.stack([by_class[c][rank] for c in selected])])
        for c, image in zip(selected, drawable, strict=True):
            if uri := budget.uri(image):
                rows[c][2].append(uri)
        total += len(selected)
    return [row for row in rows if row[2]]
