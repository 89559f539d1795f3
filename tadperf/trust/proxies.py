"""Proxies: small networks that train briefly on the trusted view and then classify every sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf import seeds
from tadperf.compute.workers import run_parallel
from tadperf.config import TrustConfig
from tadperf.data import augment as augmentation
from tadperf.data.images import Images
from tadperf.kernels import per_sample
from tadperf.nets.architectures import build
from tadperf.nets.fused import fused_forward
from tadperf.nets.problem import Problem
from tadperf.nets.training import batches, sgd_step, summed_gradient
from tadperf.progress import Progress
from tadperf.trust.epoch_progress import EpochProgress
from tadperf.trust.state import TrustedView

AVERAGED_EPOCHS = 4  # losses and probabilities are means over the last epochs; not tuned
MAX_FEATURES = 512  # of all proxies together; wider features are projected; not tuned
EVAL_BATCH = 1024  # images in a forward pass without gradients; not tuned


class ProxyOutputs(NamedTuple):
    """losses [N] of the given labels, probabilities [N, C], and features [N, D] of all proxies side by side."""

    losses: Tensor
    probabilities: Tensor
    features: Tensor


def train_proxies(problem: Problem, view: TrustedView, config: TrustConfig, progress: Progress) -> ProxyOutputs:
    """Trains the proxies on the view and runs them on all samples.

    On a CPU, several train in parallel on one core each. problem: its labels are the given labels. Losses and
    probabilities are means over the last epochs and over the proxies. With `config.held_out`, proxy m trains without
    fold m of the samples, and the outputs of those samples come from proxy m alone. The result depends on (seed, view)
    only.
    """
    count, proxies, seed = len(problem.images), config.proxies, problem.seed
    fold = torch.randperm(count, generator=seeds.generator(seed, "proxy folds")) % proxies
    held_out = config.held_out and proxies > 1

    # Returns NumPy arrays: PyTorch would send tensors through shared files, which stay behind if a worker is killed.
    def train(m: int) -> tuple[np.ndarray, ...]:
        inside = fold[view.index] != m if held_out else torch.ones(len(view.index), dtype=torch.bool)
        part = TrustedView(*(values[inside] for values in view))
        proxy_problem = replace(problem, seed=seeds.derive(seed, "proxy", m))
        outputs = train_proxy(proxy_problem, part, config, lambda: reporter.epoch_done(m))
        return tuple(values.numpy() for values in outputs)

    results: dict[int, tuple[np.ndarray, ...]] = {}
    with EpochProgress(progress, "trust:proxies", proxies, config.epochs) as reporter:
        for m, result in run_parallel(train, list(range(proxies)), None if problem.device.type == "cpu" else 1):
            results[m] = result
            reporter.network_done(m)
    losses, probabilities, features = (
        torch.stack([torch.from_numpy(results[m][i]) for m in range(proxies)]) for i in range(3)
    )
    features = features.permute(1, 0, 2).flatten(1)
    if held_out:
        sample = torch.arange(count)
        return ProxyOutputs(losses[fold, sample], probabilities[fold, sample], features)
    return ProxyOutputs(losses.mean(0), probabilities.mean(0), features)


def train_proxy(
    problem: Problem, view: TrustedView, config: TrustConfig, epoch_done: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor, Tensor]:
    """Trains one proxy; returns losses [N] of the given labels, probabilities [N, C] and features [N, D] on the CPU.

    epoch_done: called after every epoch.
    """
    images, classes, device = problem.images, problem.num_classes, problem.device
    module = build(problem.net, problem.shape, classes, problem.seed).to(device)
    assert isinstance(module, nn.Sequential), "the last module is the classifier, the modules before give the features"
    parameters = tuple(module.parameters())
    velocity = tuple(map(torch.zeros_like, parameters))
    target = (F.one_hot(view.labels, classes) * view.weights.unsqueeze(1)).to(device)
    losses, probabilities = torch.zeros(len(images)), torch.zeros(len(images), classes)
    averaged = min(AVERAGED_EPOCHS, config.epochs)
    predict = fused_forward(module)
    for epoch in range(config.epochs):
        module.train()
        for loss in epoch_losses(predict, problem, view.index, target, config, epoch):
            sgd_step(parameters, velocity, summed_gradient([loss], parameters), config.lr, 0.0, 0.0)
        if epoch >= config.epochs - averaged:
            logits = predict_all(module, images, device).cpu()
            losses += per_sample(logits, problem.labels).loss / averaged
            probabilities += logits.softmax(1) / averaged
        epoch_done()
    features = predict_all(module[:-1], images, device).cpu()
    return losses, probabilities, compact_features(features, MAX_FEATURES // config.proxies, problem.seed)


def epoch_losses(
    module: Callable[[Tensor], Tensor],
    problem: Problem,
    index: Tensor,
    target: Tensor,
    config: TrustConfig,
    epoch: int,
) -> Iterator[Tensor]:
    """Yields the loss of every batch of one epoch over the samples at `index` (int64 [M]).

    target: [M, C], the one-hot labels times the weights. A batch whose weights are all 0 has loss 0.
    """
    images, augment, size = problem.images, problem.augment, problem.shape[-1]
    generator = seeds.generator(problem.seed, "epoch", epoch)
    count, pixels = len(index), images[torch.zeros(1, dtype=torch.int64)].numel()
    order = torch.randperm(count, generator=generator)
    drawn = augmentation.draw(augment, count, size, generator)
    others = torch.randint(len(images), (count if config.consistency else 0,), generator=generator)
    pair_draws = [augmentation.draw(augment, len(others), size, generator) for _ in range(2)]
    start = 0
    for _, x in batches(images, index[order], drawn, config.batch, pixels, target.device):
        stop = start + len(x)
        y = target[order[start:stop]]
        if config.mixup:  # Zhang et al. (2018), Beta(1, 1): the network fits single wrong labels more slowly
            share = float(torch.rand((), generator=generator))
            pair = torch.randperm(len(x), generator=generator)
            x, y = torch.lerp(x[pair], x, share), torch.lerp(y[pair], y, share)
        loss = -(y * module(x).log_softmax(1)).sum() / y.sum().clamp(min=torch.finfo(y.dtype).tiny)
        if config.consistency:
            unlabelled = images[others[start:stop]].to(target.device)
            views = [augmentation.apply(unlabelled, draw.rows(start, stop)) for draw in pair_draws]
            loss = loss + config.consistency * consistency_loss(module, views[0], views[1])
        start = stop
        yield loss


def consistency_loss(module: Callable[[Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Returns the mean KL(p(first) || p(second)) of two views of the same images; no gradient through the first."""
    with torch.no_grad():
        reference = module(first).log_softmax(1)
    return F.kl_div(module(second).log_softmax(1), reference, reduction="batchmean", log_target=True)


@torch.no_grad()
def predict_all(module: nn.Module, images: Images, device: torch.device) -> Tensor:
    """Returns the outputs of `module` in eval mode for all images, computed in batches."""
    predict = fused_forward(module.eval())
    index = torch.arange(len(images))
    return torch.cat([predict(images[part].to(device)) for part in index.split(EVAL_BATCH)])


def compact_features(features: Tensor, width: int, seed: int) -> Tensor:
    """Centres features [N, D], reduces D to at most `width` by a random projection, and scales them to length 1.

    The projection keeps distances approximately (Johnson and Lindenstrauss, 1984).
    """
    z = features - features.mean(0)
    if z.shape[1] > width:
        generator = seeds.generator(seed, "projection")
        z = z @ torch.randn(z.shape[1], width, generator=generator).mul_(width**-0.5)
    return F.normalize(z, dim=1)
