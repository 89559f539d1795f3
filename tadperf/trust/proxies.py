"""Proxies: small networks trained briefly on the trusted view, and what they see of every sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf import seeds
from tadperf.compute.workers import run_parallel
from tadperf.config import NetConfig, TrustConfig
from tadperf.data import augment as augmentation
from tadperf.data.images import Images
from tadperf.kernels import per_sample
from tadperf.nets.architectures import build
from tadperf.nets.fused import fused_forward
from tadperf.nets.training import batches, sgd_step, summed_gradient
from tadperf.progress import Progress
from tadperf.trust.state import TrustedView

LAST = 4  # epochs whose losses are averaged
FEATURES = 512  # of all proxies together; wider ones are projected
BATCH = 1024  # of a pass without gradient


class ProxyOutputs(NamedTuple):
    """losses [N] of the given labels, probabilities [N, C], and features [N, D] of all proxies side by side."""

    losses: Tensor
    probabilities: Tensor
    features: Tensor


def train_proxies(
    images: Images,
    labels: Tensor,
    view: TrustedView,
    num_classes: int,
    net: NetConfig,
    config: TrustConfig,
    augment: str,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> ProxyOutputs:
    """Trains the proxies on the view and looks at all samples with them; on a CPU several at once, one core each.

    Losses and probabilities are means over the last epochs, and over the proxies; with `config.held_out` proxy m is
    trained without fold m of the samples and alone speaks for it. Depends on (seed, view) only.
    """
    count, proxies = len(images), config.proxies
    fold = torch.randperm(count, generator=seeds.generator(seed, "proxy folds")) % proxies
    split = config.held_out and proxies > 1

    def train(m: int) -> tuple[np.ndarray, ...]:  # not tensors: those cross by shared files, which a kill leaves behind
        inside = fold[view.index] != m if split else torch.ones(len(view.index), dtype=torch.bool)
        own = TrustedView(*(part[inside] for part in view))
        purpose = seeds.derive(seed, "proxy", m)
        made = train_proxy(images, labels, own, num_classes, net, config, augment, purpose, device)
        return tuple(part.numpy() for part in made)

    parts: dict[int, tuple[np.ndarray, ...]] = {}
    for m, part in run_parallel(train, list(range(proxies)), None if device.type == "cpu" else 1):
        parts[m] = part
        progress("trust:proxies", len(parts), proxies)
    losses, probabilities, features = (
        torch.stack([torch.from_numpy(parts[m][i]) for m in range(proxies)]) for i in range(3)
    )
    features = features.permute(1, 0, 2).flatten(1)
    if split:
        own = torch.arange(count)
        return ProxyOutputs(losses[fold, own], probabilities[fold, own], features)
    return ProxyOutputs(losses.mean(0), probabilities.mean(0), features)


def train_proxy(
    images: Images,
    labels: Tensor,
    view: TrustedView,
    num_classes: int,
    net: NetConfig,
    config: TrustConfig,
    augment: str,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """One proxy: losses [N] of `labels`, probabilities [N, C] and features [N, D] of all samples."""
    channels, height, width = images[torch.zeros(1, dtype=torch.int64)].shape[1:]
    module = build(net, (channels, height, width), num_classes, seed).to(device)
    assert isinstance(module, nn.Sequential), "the last module is the classifier, what precedes it gives the features"
    parameters = tuple(module.parameters())
    velocity = tuple(map(torch.zeros_like, parameters))
    target = F.one_hot(view.labels, num_classes) * view.weights.unsqueeze(1)
    losses, probabilities = torch.zeros(len(images)), torch.zeros(len(images), num_classes)
    counted = min(LAST, config.epochs)
    target, predict = target.to(device), fused_forward(module)
    for epoch in range(config.epochs):
        module.train()
        generator = seeds.generator(seed, "epoch", epoch)
        for loss in steps(predict, images, view.index, target, config, augment, generator):
            sgd_step(parameters, velocity, summed_gradient([loss], parameters), config.lr, 0.0, 0.0)
        if epoch >= config.epochs - counted:
            logits = run(module, images, device).cpu()
            losses += per_sample(logits, labels).loss / counted
            probabilities += logits.softmax(1) / counted
    features = run(module[:-1], images, device).cpu()
    return losses, probabilities, compact(features, FEATURES // config.proxies, seed)


def steps(
    module: Callable[[Tensor], Tensor],
    images: Images,
    index: Tensor,
    target: Tensor,
    config: TrustConfig,
    augment: str,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """The losses of one epoch over the samples at `index`, with target [M, C] the one-hot label times the weight."""
    count, every, first = len(index), len(images), images[torch.zeros(1, dtype=torch.int64)]
    size = first.shape[-1]
    order = torch.randperm(count, generator=generator)
    drawn = augmentation.draw(augment, count, size, generator)
    others = torch.randint(every, (count if config.consistency else 0,), generator=generator)
    twice = [augmentation.draw(augment, len(others), size, generator) for _ in range(2)]
    start = 0
    for _, x in batches(images, index[order], drawn, config.batch, first.numel(), target.device):
        stop = start + len(x)
        rows = order[start:stop]
        y = target[rows]
        if config.mixup:  # Zhang et al. (2018), Beta(1, 1): a network that mixes is slower to fit single wrong labels
            share = float(torch.rand((), generator=generator))
            pair = torch.randperm(len(rows), generator=generator)
            x, y = torch.lerp(x[pair], x, share), torch.lerp(y[pair], y, share)
        loss = -(y * module(x).log_softmax(1)).sum() / y.sum()
        if config.consistency:
            both = others[start:stop]
            views = [augmentation.apply(images[both].to(target.device), v.rows(start, stop)) for v in twice]
            with torch.no_grad():
                first = module(views[0]).log_softmax(1)
            second = module(views[1]).log_softmax(1)
            loss = loss + config.consistency * F.kl_div(second, first, reduction="batchmean", log_target=True)
        start = stop
        yield loss


@torch.no_grad()
def run(module: nn.Module, images: Images, device: torch.device) -> Tensor:
    """What `module` makes of all images, in batches and eval mode."""
    predict = fused_forward(module.eval())
    index = torch.arange(len(images))
    return torch.cat([predict(images[part].to(device)) for part in index.split(BATCH)])


def compact(features: Tensor, width: int, seed: int) -> Tensor:
    """Centred features [N, D] at length 1, those wider than `width` by a random projection (Johnson-Lindenstrauss)."""
    z = features - features.mean(0)
    if z.shape[1] > width:
        generator = seeds.generator(seed, "projection")
        z = z @ torch.randn(z.shape[1], width, generator=generator).mul_(width**-0.5)
    return F.normalize(z, dim=1)
