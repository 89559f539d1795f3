"""Proxies: small networks that train briefly on the trusted view and then classify every sample.

On CUDA a proxy stays on the device: CUDA graphs of several steps make its batches, the random values of an epoch travel
there in one copy that does not block, and the outputs never leave it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf import seeds
from tadperf.compute import ranks
from tadperf.compute.cuda_graphs import GraphedStep
from tadperf.compute.streams import run_in_parts, run_to_end
from tadperf.compute.torch_settings import torch_settings
from tadperf.compute.transfer import upload, upload_all
from tadperf.compute.work_progress import add_tested, add_trained, reporting, work
from tadperf.config import TrustConfig
from tadperf.data.images import Images, index_device
from tadperf.kernels import per_sample
from tadperf.nets.architectures import build
from tadperf.nets.device_batches import DeviceDraws, batch_sizes, graph_steps
from tadperf.nets.fused import fused_forward
from tadperf.nets.optimiser import sgd_step
from tadperf.nets.problem import Problem
from tadperf.nets.training import gradients_or_zeros, to_device
from tadperf.progress import Progress
from tadperf.trust.proxy_batches import (
    EpochDraws,
    ProxyBatch,
    batch_on_device,
    draw_epoch,
    epoch_batches,
    with_image_shares,
)
from tadperf.trust.state import TrustedView
from tadperf.trust.top_classes import (
    Probabilities,
    TopClasses,
    concatenate,
    from_tensors,
    is_large,
    mean_of,
    no_classes,
    one_hot,
    select,
)

AVERAGED_EPOCHS = 4  # losses and probabilities are means over the last epochs; not tuned
MAX_FEATURES = 512  # of all proxies together; wider features are projected; not tuned
WARM_UP = 0.2  # share of the epochs in which the rate of "one-cycle" grows; not tuned
EVAL_BATCH = 1024  # images in a forward pass without gradients; not tuned


class ProxyOutputs(NamedTuple):
    """losses [N] of the given labels, probabilities [N, C], and features [N, D] of all proxies side by side.

    Large sets have `TopClasses` instead of [N, C].
    """

    losses: Tensor
    probabilities: Probabilities
    features: Tensor


class SoftView(NamedTuple):
    """A `TrustedView` of all samples with soft labels; the sum of a row is the sample's weight."""

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    labels: Probabilities
    weights: Tensor


def proxy_problem(problem: Problem, config: TrustConfig) -> Problem:
    """Returns the problem with the width and the augmentation of the proxies, if the configuration names them."""
    net = problem.net if config.width is None else problem.net.model_copy(update={"width": config.width})
    return replace(problem, net=net, augment=problem.augment if config.augment is None else config.augment)


class Rate:
    """The learning rate of the proxies, which changes from epoch to epoch.

    value: a number on a CPU; on CUDA a float32 scalar, which recorded graphs read.
    """

    def __init__(self, config: TrustConfig, device: torch.device) -> None:
        self.rates = learning_rates(config)
        self.value: float | Tensor = self.rates[0]
        if device.type == "cuda" and len(set(self.rates)) > 1:
            self.value = torch.full((), self.rates[0], device=device)

    def set(self, epoch: int) -> None:
        """Takes the rate of an epoch; past the last epoch, keeps the rate."""
        if epoch >= len(self.rates):
            return
        if isinstance(self.value, Tensor):
            self.value.fill_(self.rates[epoch])
        else:
            self.value = self.rates[epoch]


def learning_rates(config: TrustConfig) -> list[float]:
    """Returns the learning rate of each epoch.

    With the schedule "one-cycle" it grows linearly to `config.lr` in the first fifth of the training, and then falls
    linearly to 0 (Smith and Topin, 2018). An epoch has the rate of its middle.
    """
    if config.schedule == "constant":
        return [config.lr] * config.epochs
    middles = [(epoch + 0.5) / config.epochs for epoch in range(config.epochs)]
    return [config.lr * min(u / WARM_UP, (1 - u) / (1 - WARM_UP)) for u in middles]


def train_proxies(
    problem: Problem, view: TrustedView | SoftView, config: TrustConfig, progress: Progress
) -> ProxyOutputs:
    """Trains the proxies on the view and runs them on all samples. The outputs are on the problem's device.

    On a CPU, several train in parallel on one core each; on CUDA, small ones train side by side. problem: its labels
    are the given labels. The labels of the view may be soft, float [M, C]. Losses and probabilities are means over the
    last epochs and over the proxies. With `config.held_out`, proxy m trains without fold m of the samples, and the
    outputs of those samples come from proxy m alone. The result depends on (seed, view) only.
    """
    problem = proxy_problem(problem, config)
    count, proxies, seed, device = len(problem.images), config.proxies, problem.seed, problem.device
    fold = torch.randperm(count, generator=seeds.generator(seed, "proxy folds")) % proxies
    held_out, on_cpu = config.held_out and proxies > 1, device.type == "cpu"

    def parts(m: int) -> Generator[object, None, tuple[Any, ...]]:
        inside = fold[view.index] != m if held_out else torch.ones(len(view.index), dtype=torch.bool)
        part = SoftView(view.index[inside], select(view.labels, inside), view.weights[inside])
        counted = (fold == m).nonzero().squeeze(1) if held_out else torch.arange(count)
        # A CPU tests all samples, because the last bits of an output may depend on the other images of its batch.
        tested = torch.arange(count) if on_cpu else counted
        own_problem = replace(problem, seed=seeds.derive(seed, "proxy", m))
        outputs = yield from proxy_parts(own_problem, part, tested, config)
        if not on_cpu:
            return outputs
        # NumPy arrays: PyTorch would send tensors through shared files, which stay behind if a worker is killed.
        losses, probabilities, features = outputs
        return losses[counted].numpy(), _as_numpy(select(probabilities, counted)), features.numpy()

    sizes = zip(*(values.bincount(minlength=proxies).tolist() for values in (fold[view.index], fold)), strict=True)
    works = [
        proxy_work(len(view.index) - held_out * in_view, count if on_cpu or not held_out else in_fold, count, config)
        for in_view, in_fold in sizes
    ]
    total = sum(works[m] for m in ranks.assigned(proxies))
    with reporting(progress, "trust:proxies", total):
        activations = config.batch * problem.net.width * math.prod(problem.shape[1:])
        results = dict(run_in_parts(parts, range(proxies), device, activations))
    losses, probabilities, features = ([_as_tensors(results[m][i]) for m in range(proxies)] for i in range(3))
    del results
    # The position of each sample after the folds are concatenated.
    position = fold.argsort(stable=True).argsort().to(device) if held_out else None
    return ProxyOutputs(_join(losses, position), _join(probabilities, position), torch.cat(features, 1))


def _join(parts: list[Any], position: Tensor | None) -> Any:
    """Returns the outputs of all samples: those of the folds in the order of the data, or with None the mean."""
    if isinstance(parts[0], TopClasses):
        return mean_of(parts) if position is None else select(concatenate(parts), position)
    return torch.stack(parts).mean(0) if position is None else torch.cat(parts)[position]


def _as_numpy(p: Probabilities) -> Any:
    return p.numpy() if isinstance(p, Tensor) else (*(values.numpy() for values in p[:3]), p.num_classes)


def _as_tensors(values: Any) -> Any:
    """Returns the tensors of NumPy arrays; values that are tensors already stay as they are."""
    if isinstance(values, tuple):
        return from_tensors(map(torch.as_tensor, values[:3]), values[3])
    return torch.as_tensor(values)


def proxy_work(trained: int, tested: int, count: int, config: TrustConfig) -> int:
    """Returns the units of work of a proxy that trains on `trained` images and tests some or all of `count`."""
    return work(config.epochs * trained, min(AVERAGED_EPOCHS, config.epochs) * tested + count)


def train_proxy(
    problem: Problem, view: TrustedView | SoftView, tested: Tensor, config: TrustConfig
) -> tuple[Tensor, Probabilities, Tensor]:
    """Trains one proxy; returns losses [T] of the given labels, probabilities [T, C] and features [N, D].

    tested: int64 [T], the samples to return losses and probabilities of. The results are on the problem's device.
    """
    return run_to_end(proxy_parts(problem, view, tested, config))


def proxy_parts(
    problem: Problem, view: TrustedView | SoftView, tested: Tensor, config: TrustConfig
) -> Generator[object, None, tuple[Tensor, Probabilities, Tensor]]:
    """Does the same epoch by epoch, for `run_in_parts`."""
    images, classes, device = problem.images, problem.num_classes, problem.device
    module = to_device(build(problem.net, problem.shape, classes, problem.seed), device)
    assert isinstance(module, nn.Sequential), "the last module is the classifier, the modules before give the features"
    if device.type == "cuda":
        cast(Any, module).to(memory_format=torch.channels_last)  # PyTorch does not declare this argument
    parameters, predict = tuple(module.parameters()), fused_forward(module)
    velocity, zeros = tuple(map(torch.zeros_like, parameters)), {}
    large = is_large(len(images), classes)
    labels, weights, given = upload((view.labels, view.weights, problem.labels[tested]), device)
    index, tested_images = upload_all([view.index, tested], index_device(images))
    target = training_targets(labels, weights, classes, large)
    rate = Rate(config, device)

    def step(*fields: Any) -> None:
        loss = proxy_loss(predict, ProxyBatch(*fields), config.consistency)
        gradients = gradients_or_zeros(loss, parameters, zeros)
        sgd_step(parameters, velocity, gradients, rate.value, config.momentum, config.weight_decay)

    averaged = min(AVERAGED_EPOCHS, config.epochs)
    width = MAX_FEATURES // config.proxies
    means, features = OutputMeans(given, classes, averaged, large), torch.empty(0)
    module.train()
    for epoch in train_epochs(step, problem, index, target, config):
        module.eval()
        if epoch == config.epochs - 1 and not large:
            features = predict_all(module[:-1], images, device)
            means.add(module[-1], features, tested_images.to(device))
        elif epoch >= config.epochs - averaged:
            means.add(predict, images, tested_images)
        module.train()
        rate.set(epoch + 1)
        yield
    if large:
        features = compact_outputs(module[:-1], images, device, width, problem.seed)
    else:
        features = compact_features(features, width, problem.seed)
    return means.losses, means.probabilities, features


def training_targets(labels: Probabilities, weights: Tensor, classes: int, large: bool) -> Probabilities:
    """Returns one-hot or soft labels times the weights of the samples, [M, C]. labels: int64 [M], or soft labels."""
    if isinstance(labels, Tensor) and large:
        labels = one_hot(labels, classes)
    if isinstance(labels, TopClasses):
        return labels.scaled(weights)
    return (labels if labels.is_floating_point() else F.one_hot(labels, classes)) * weights.unsqueeze(1)


def train_epochs(
    step: Callable[..., None], problem: Problem, index: Tensor, target: Probabilities, config: TrustConfig
) -> Iterator[int]:
    """Runs the steps of all epochs, and yields the number of each finished epoch. Arguments as for `epoch_batches`.

    step: takes the fields of a `ProxyBatch`. On CUDA several steps run as one graph, which makes the batches itself if
    the images are on the device.
    """
    if target.is_cuda and index.device == target.device:
        yield from _epochs_on_device(step, problem, index, target, config)
        return
    run_step = GraphedStep(step) if target.is_cuda else step
    for epoch in range(config.epochs):
        for batch in epoch_batches(problem, index, target, config, epoch):
            run_step(*batch)
            add_trained(len(batch.x))
        yield epoch


def _epochs_on_device(
    step: Callable[..., None], problem: Problem, index: Tensor, target: Probabilities, config: TrustConfig
) -> Iterator[int]:
    sizes = batch_sizes(len(index), config.batch)
    draws = DeviceDraws[EpochDraws](target.device)

    def run_steps(*sizes: int) -> None:
        for size in sizes:
            step(*batch_on_device(problem.images, index, target, draws.next_rows(size)))

    graph = GraphedStep(run_steps, target.device)
    for epoch in range(config.epochs):
        draws.load(with_image_shares(draw_epoch(problem, len(index), config, epoch), config.batch))
        for part in graph_steps(sizes):
            graph(*part)
            add_trained(sum(part))
        yield epoch


def proxy_loss(module: Callable[[Tensor], Tensor], batch: ProxyBatch, consistency: float) -> Tensor:
    """Returns the weighted mean cross-entropy of a batch, plus `consistency` times the consistency loss of its views.

    If all weights are 0, the cross-entropy is 0.
    """
    x, y = batch.x, batch.target
    if batch.share is not None:
        x, y = torch.lerp(x[batch.pair], x, batch.share), torch.lerp(y[batch.pair], y, batch.share)
    loss = -(y * module(x).log_softmax(1)).sum() / y.sum().clamp(min=torch.finfo(y.dtype).tiny)
    if batch.first is None or batch.second is None:
        return loss
    return loss + consistency * consistency_loss(module, batch.first, batch.second)


def consistency_loss(module: Callable[[Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Returns the mean KL(p(first) || p(second)) of two views of the same images; no gradient through the first."""
    with torch.no_grad():
        reference = module(first).log_softmax(1)
    return F.kl_div(module(second).log_softmax(1), reference, reduction="batchmean", log_target=True)


class OutputMeans:
    """Means of the losses [T] and probabilities [T, C] of T samples over the last epochs."""

    def __init__(self, labels: Tensor, classes: int, epochs: int, large: bool = False) -> None:
        """labels: int64 [T], the given labels, on the device. large: keeps the likeliest classes of the sum so far."""
        self.labels, self.epochs, shape = labels, epochs, (len(labels), classes)
        self.losses = torch.zeros(len(labels), device=labels.device)
        self.probabilities: Probabilities = (
            no_classes(*shape, labels.device) if large else torch.zeros(*shape, device=labels.device)
        )

    @torch.no_grad()
    def add(self, classify: Callable[[Tensor], Tensor], inputs: Images, index: Tensor) -> None:
        """Adds one epoch. The samples are inputs[index]; `classify` returns the logits of a batch of them.

        Loss and probabilities are read from the logits of one batch, while they are in the cache: 4 MB for 1000
        classes. `per_sample_linear` needs no logits, but the probabilities do. It would save one read of 4 C bytes a
        sample from the cache, and multiply D features by C classes a second time. So it is not used for any number of
        classes. This is a count; nobody measured it on a GPU.
        """
        for start in range(0, len(index), EVAL_BATCH):
            rows = slice(start, start + EVAL_BATCH)
            logits = classify(inputs[index[rows]].to(self.labels.device))
            self.losses[rows].add_(per_sample(logits, self.labels[rows]).loss / self.epochs)
            p = logits.softmax(1) / self.epochs
            if isinstance(self.probabilities, Tensor):
                self.probabilities[rows].add_(p)
            else:
                self.probabilities.write(rows, self.probabilities.dense(rows).add_(p))
            add_tested(len(logits))


@torch.no_grad()
def predict_all(module: nn.Module, images: Images, device: torch.device) -> Tensor:
    """Returns the outputs of `module` in eval mode for all images, computed in batches."""
    predict = fused_forward(module.eval())
    index = torch.arange(len(images), device=index_device(images))
    outputs = []
    for part in index.split(EVAL_BATCH):
        outputs.append(predict(images[part].to(device)))
        add_tested(len(part))
    return torch.cat(outputs)


@torch.no_grad()
@torch_settings(tf32=False)
def compact_outputs(module: nn.Module, images: Images, device: torch.device, width: int, seed: int) -> Tensor:
    """Returns `compact_features` of the module's outputs for all images, and never holds the outputs [N, D] as a whole.

    A network for 64 x 64 pixels has 2048 outputs: 10.5 GB for 1.28 M images.
    """
    predict, total = fused_forward(module.eval()), torch.zeros((), device=device)
    projection, result, start = None, torch.empty(0), 0
    for part in torch.arange(len(images), device=index_device(images)).split(EVAL_BATCH):
        outputs = predict(images[part].to(device))
        if start == 0:
            projection = _projection(outputs, width, seed)
            result = torch.empty(len(images), min(outputs.shape[1], width), device=device)
        total = total + outputs.sum(0, dtype=torch.float64)
        result[start : start + len(part)] = outputs if projection is None else outputs @ projection
        start += len(part)
        add_tested(len(part))
    mean = (total / len(images)).float()
    result -= mean if projection is None else mean @ projection
    return result.div_(result.norm(dim=1, keepdim=True).clamp(min=1e-12))


def _projection(z: Tensor, width: int, seed: int) -> Tensor | None:
    """Returns the random projection [D, width] of features z [N, D], on their device; None if they are narrow."""
    if z.shape[1] <= width:
        return None
    projection = torch.randn(z.shape[1], width, generator=seeds.generator(seed, "projection")).mul_(width**-0.5)
    return upload_all([projection], z.device)[0]


@torch_settings(tf32=False)
def compact_features(features: Tensor, width: int, seed: int) -> Tensor:
    """Centres features [N, D], reduces D to at most `width` by a random projection, and scales them to length 1.

    The projection keeps distances approximately (Johnson and Lindenstrauss, 1984). It has full precision on CUDA too,
    because verdicts depend on it.
    """
    z = features - features.mean(0)
    projection = _projection(z, width, seed)
    if projection is not None:
        z = z @ projection
    return F.normalize(z, dim=1)
