"""The training batches of a proxy: all random values of an epoch are drawn at once and sent to the device together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.compute.transfer import upload
from tadperf.config import TrustConfig
from tadperf.data import augment
from tadperf.data.augment import Draw
from tadperf.data.images import Images
from tadperf.nets.problem import Problem
from tadperf.trust.top_classes import Probabilities, dense_rows

# Pixel values that are augmented in one call. On CUDA one call serves many batches, so that its launches cost little:
# 64 MB of float32 pixels. Neither was tuned.
CPU_CHUNK, CUDA_CHUNK = 1 << 19, 1 << 24


class ProxyBatch(NamedTuple):
    """One batch of B augmented images x [B, channels, H, W], and what their loss needs.

    target: [B, C], one-hot labels times weights. share, pair: image i is mixed with image pair[i] and keeps this share;
    None without mixup. first, second: two views of the same B unlabelled images; None without the consistency loss.
    """

    x: Tensor
    target: Tensor
    share: Tensor | None
    pair: Tensor | None
    first: Tensor | None
    second: Tensor | None


class EpochDraws(NamedTuple):
    """The random values of one epoch over M samples.

    order: int64 [M]. augmentation: of the images in this order. share: float32, one value for each batch, or for each
    image after `with_image_shares`. pair: int64 [M], positions within the batch. Both are None without mixup.
    others: int64 [M], the unlabelled images of the consistency loss, and views, their two augmentations; None without
    it.
    """

    order: Tensor
    augmentation: Draw
    share: Tensor | None
    pair: Tensor | None
    others: Tensor | None
    views: tuple[Draw, Draw] | None

    def to(self, device: torch.device) -> EpochDraws:
        """Returns the values on a device. To CUDA they travel in one copy, and the CPU does not wait for it."""
        return upload(self, device)


def draw_epoch(problem: Problem, count: int, config: TrustConfig, epoch: int) -> EpochDraws:
    """Draws all random values of one epoch over `count` samples, on the CPU."""
    generator, side = seeds.generator(problem.seed, "epoch", epoch), problem.shape[-1]
    order = torch.randperm(count, generator=generator)
    drawn = augment.draw(problem.augment, count, side, generator)
    share = pair = others = views = None
    if config.consistency:
        others = torch.randint(len(problem.images), (count,), generator=generator)
        first, second = (augment.draw(problem.augment, count, side, generator) for _ in range(2))
        views = first, second
    if config.mixup and count:
        mixed = [  # Zhang et al. (2018), Beta(1, 1): the network fits single wrong labels more slowly
            (torch.rand((), generator=generator), torch.randperm(min(config.batch, count - start), generator=generator))
            for start in range(0, count, config.batch)
        ]
        share, pair = torch.stack([value for value, _ in mixed]), torch.cat([part for _, part in mixed])
    return EpochDraws(order, drawn, share, pair, others, views)


def epoch_batches(
    problem: Problem, index: Tensor, target: Probabilities, config: TrustConfig, epoch: int
) -> Iterator[ProxyBatch]:
    """Yields the batches of one epoch over the samples at `index`, int64 [M], on the device of `target`.

    index: on `index_device` of the images. target: [M, C], one-hot labels times weights. Many batches are augmented in
    one call.
    """
    images, device, batch, count = problem.images, target.device, config.batch, len(index)
    drawn = draw_epoch(problem, count, config, epoch)
    draws = drawn.to(device)
    lookup = draws if index.device == device else drawn
    rows, others = index[lookup.order], lookup.others
    limit = CUDA_CHUNK if device.type == "cuda" else CPU_CHUNK
    chunk = batch * max(1, limit // (batch * math.prod(problem.shape)))
    for begin in range(0, count, chunk):
        end = min(begin + chunk, count)
        x = augment.apply(images[rows[begin:end]].to(device), draws.augmentation.rows(begin, end))
        y, views = dense_rows(target, draws.order[begin:end]), []
        if others is not None and draws.views is not None:
            unlabelled = images[others[begin:end]].to(device)
            views = [augment.apply(unlabelled, draw.rows(begin, end)) for draw in draws.views]
        for start in range(begin, end, batch):
            stop = min(start + batch, end)
            x_part, y_part, *pair = (values[start - begin : stop - begin] for values in (x, y, *views))
            share = None if draws.share is None else draws.share[start // batch]
            partner = None if draws.pair is None else draws.pair[start:stop]
            first, second = pair or (None, None)
            yield ProxyBatch(x_part, y_part, share, partner, first, second)


def with_image_shares(draws: EpochDraws, batch: int) -> EpochDraws:
    """Returns the draws with a share for every image, that of its batch. So each tensor has one row for each image."""
    if draws.share is None:
        return draws
    return draws._replace(share=draws.share.repeat_interleave(batch)[: len(draws.order)])


def batch_on_device(images: Images, index: Tensor, target: Probabilities, rows: EpochDraws) -> ProxyBatch:
    """Returns the batch of some rows of `with_image_shares`, for a CUDA graph. Everything is on the device.

    index, target: as for `epoch_batches`.
    """
    x, views = augment.apply(images[index[rows.order]], rows.augmentation), (None, None)
    if rows.others is not None and rows.views is not None:
        unlabelled = images[rows.others]
        views = tuple(augment.apply(unlabelled, drawn) for drawn in rows.views)
    share = None if rows.share is None else rows.share[0]
    return ProxyBatch(x, dense_rows(target, rows.order), share, rows.pair, *views)
