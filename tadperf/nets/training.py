"""The training loop of experts, students and baselines, and their accuracy."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby, repeat
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf import seeds
from tadperf.compute.cuda_graphs import GraphedStep
from tadperf.compute.transfer import upload_all
from tadperf.compute.work_progress import add_tested, add_trained
from tadperf.data import augment
from tadperf.data.image_draws import ImageDraws
from tadperf.data.images import Images, first_image, index_device
from tadperf.errors import UserError
from tadperf.kernels import implementations, per_sample, per_sample_linear
from tadperf.kernels.ops.per_sample import loss_gradient
from tadperf.nets.device_batches import STEPS_PER_GRAPH, DeviceBatches, batch_sizes, graph_steps
from tadperf.nets.fused import fused_forward, has_hooks
from tadperf.nets.optimiser import UPDATES, gsam_gradient

# Activations of the widest layer that fit into the CPU's caches: 32 images at width 128 and 32 x 32 pixels, which gives
# 1.7 times the images per second of whole batches of 256 (see `cache_batch_size`). Other values were not tried.
CACHE_ACTIVATIONS = 1 << 22
# The number of pixel values that are augmented in one call, and of those whose augmentations are drawn in one call.
# Changing it changes the bits of every result, because it decides how many epochs share one call to `augment.draw`.
DRAW_CHUNK = 1 << 19
# From this number of classes, networks are tested without a matrix of logits. On a CPU, 20 000 x 128 features and 1000
# classes take 29.0 ms, 30.6 ms with logits; 2000 x 256 and 20 000 classes 110 and 117 ms (bench/results/operators.md).
WIDE_HEAD = 1000
DEVICE_DRAWS = 1 << 14  # images whose draws are uploaded to CUDA in one copy of at most 0.9 MB; not tuned


Optimizer = Literal["sgd", "muon"]
Step = Callable[[Tensor, Tensor, float | Tensor], None]  # indices [B], augmented images [B, C, H, W], learning rate


def to_device(module: nn.Module, device: torch.device) -> nn.Module:
    """Moves a network in place, and returns it. To CUDA all its tensors travel in one copy, without a wait.

    They share this memory afterwards.
    """
    if device.type != "cuda":
        return module.to(device)
    tensors = [*module.parameters(), *module.buffers()]
    moved = upload_all([tensor.detach() for tensor in tensors], device)
    by_tensor = {id(tensor): copy for tensor, copy in zip(tensors, moved, strict=True)}
    return module._apply(lambda tensor: by_tensor[id(tensor)])


class Recipe(NamedTuple):
    """The settings of a training.

    optimizer: sgd, or muon for `muon_step`.
    decay: divides the learning rate by 10 after half of the epochs. rho, alpha: arguments of `gsam_gradient`, which is
    used if rho > 0 and costs a second pass.
    """

    epochs: int
    batch: int
    lr: float
    momentum: float
    weight_decay: float
    augment: str
    decay: bool = True
    rho: float = 0.0
    alpha: float = 0.0
    optimizer: Optimizer = "sgd"

    def rate(self, epoch: int) -> float:
        """Returns the learning rate of an epoch."""
        return self.lr * (0.1 if self.decay and epoch > self.epochs // 2 else 1.0)


def batch_loss(module: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the mean cross-entropy of a batch x [B, C, H, W]; each sample is multiplied by its weight [B], if any."""
    if weights is None:
        return F.cross_entropy(module(x), target)
    return (weights * F.cross_entropy(module(x), target, reduction="none")).mean()


@torch.no_grad()
def logits_gradient(logits: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Returns the gradient of `batch_loss` with respect to the logits [B, C]. It cannot be differentiated.

    scale: float32 [B], the weight of each sample divided by B. Training needs no loss, so this takes 3 launches on
    CUDA. Autograd takes 6 for the loss and its gradient with classes, and 10 with probabilities (counted).
    """
    if target.is_floating_point():
        return logits.softmax(1, torch.float32).sub_(target).mul_(scale[:, None]).to(logits.dtype)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return loss_gradient(logits, target, logits.amax(1).float(), per_sample(logits, target).confidence, scale, out)


def summed_gradient(losses: Iterable[Tensor], parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Sums the gradients of the losses one at a time, to use less memory. Unused parameters get zeros."""
    total: tuple[Tensor, ...] = ()
    for loss in losses:
        part = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        if total:
            torch._foreach_add_(total, part)
        else:
            total = part
    return total


def gradients_or_zeros(
    output: Tensor, parameters: tuple[Tensor, ...], zeros: dict[int, Tensor], upstream: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Returns the gradients of the output. Unused parameters get the tensors of `zeros`, by number.

    Fills `zeros` at its first call. So the biases of convolutions before a norm cost no launch in each step.
    """
    found = torch.autograd.grad(output, parameters, upstream, allow_unused=True)
    for number, (part, parameter) in enumerate(zip(found, parameters, strict=True)):
        if part is None and number not in zeros:
            zeros[number] = torch.zeros_like(parameter)
    return tuple(zeros[number] if part is None else part for number, part in enumerate(found))


def cache_batch_size(module: nn.Module, pixels: int) -> int:
    """Returns how many images to train on at a time to keep the widest feature map in the CPU's caches (tadperf).

    pixels: number of pixels of one image. Two processes training the ConvNet of width 128 on 32 x 32 images in batches
    of 256 reach 245 images a second with whole batches and 420 in parts of 32. There is no limit on a GPU, which is
    faster with whole batches, and for running statistics, which need them.
    """
    convolution = next((layer for layer in module.modules() if isinstance(layer, nn.Conv2d)), None)
    if convolution is None or convolution.weight.is_cuda or next(module.buffers(), None) is not None:
        return sys.maxsize
    return max(1, CACHE_ACTIVATIONS // (convolution.out_channels * pixels))


def _scale_to_mean_one(weights: Tensor, count: int) -> Tensor:
    """Returns the weights float32 [N], scaled to mean one; raises UserError if they are not valid weights."""
    if weights.shape != (count,) or not weights.is_floating_point():
        form = f"{weights.dtype} {list(weights.shape)}"
        raise UserError("weights", form, f"must be floating point of shape [{count}], one per image")
    if not (weights.isfinite().all() and (weights >= 0).all() and weights.any()):
        limits = f"from {float(weights.min()):g} to {float(weights.max()):g}"
        raise UserError("weights", limits, "must be finite and not negative, and not all may be 0")
    return weights.float() / weights.double().mean()


def batches(
    images: Images, order: Tensor, drawn: augment.Draw, batch: int, values: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (indices, augmented images) of each batch of one epoch: int64 [B] and [B, C, H, W], on the device.

    order: indices of the images [N]. drawn: the augmentation of each image of `order`. values: number of values of one
    image. Many small batches are augmented in one call. Order and augmentations move to the device in one copy.
    """
    chunk = batch * max(1, DRAW_CHUNK // (batch * values))
    index, drawn = ImageDraws(order, drawn).to(device)
    lookup = index if index_device(images) == device else order
    for start in range(0, len(order), chunk):
        x = images[lookup[start : start + chunk]].to(device)
        x = augment.apply(x, drawn.rows(start, start + len(x)))
        yield from zip(index[start : start + chunk].split(batch), x.split(batch), strict=True)


def draw_epochs(recipe: Recipe, count: int, side: int, seed: int, group: int) -> Iterator[tuple[int, ImageDraws]]:
    """Yields the draws of `group` epochs, one epoch after the other, and how many of these epochs are needed.

    All draws come from (seed, epoch). Groups are always complete, also at the end, so the bits of an epoch do not
    depend on how many epochs follow. count: number of images. side: their side in pixels.
    """
    for start in range(0, recipe.epochs, group):
        generators = [seeds.generator(seed, "epoch", epoch) for epoch in range(start, start + group)]
        index = torch.cat([torch.randperm(count, generator=generator) for generator in generators])
        yield (
            min(group, recipe.epochs - start),
            ImageDraws(index, augment.draw(recipe.augment, count, side, *generators)),
        )


def epochs(
    images: Images, recipe: Recipe, seed: int, device: torch.device
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Yields `batches` for every epoch. Short epochs are drawn in groups."""
    first, count = first_image(images), len(images)
    values = first.numel()
    group = max(1, DRAW_CHUNK // (count * values))
    for needed, draws in draw_epochs(recipe, count, first.shape[-1], seed, group):
        for order, drawn in draws.split([count] * group)[:needed]:
            yield batches(images, order, drawn, recipe.batch, values, device)


def fit(
    module: nn.Module,
    images: Images,
    labels: Tensor,
    recipe: Recipe,
    seed: int,
    after_epoch: Callable[[int], None] | None = None,
    weights: Tensor | None = None,
    precision: torch.dtype = torch.float32,
) -> nn.Module:
    """Trains `module` in place on images [N, C, H, W]; returns it in eval mode.

    labels: int64 [N], or label logits [N, K]. weights: float [N], the importance of each image. They are scaled to mean
    one over all N, not within a batch: so the weight of an image does not depend on its batch, and equal weights
    change nothing. after_epoch: called with the number of each finished epoch.
    precision: type of the feature maps on CUDA; weights, statistics of norms and updates are float32. bfloat16 maps
    halve the memory traffic of a step. A CPU always uses float32.
    Every draw comes from (seed, epoch), so the result does not depend on what ran before.
    Raises UserError if the weights have another shape, are negative, not finite or all zero.
    """
    for epoch in fit_epochs(module, images, labels, recipe, seed, weights, precision, after_epoch is not None):
        if after_epoch:
            after_epoch(epoch)
    return module.eval()


def fit_epochs(
    module: nn.Module,
    images: Images,
    labels: Tensor,
    recipe: Recipe,
    seed: int,
    weights: Tensor | None = None,
    precision: torch.dtype = torch.float32,
    every_epoch: bool = True,
) -> Iterator[int]:
    """Trains as `fit` does, and yields the number of the epoch that is finished. Leaves the network in train mode.

    every_epoch: if false, several epochs may pass between two yields, so that CUDA graphs hold steps of more than one.
    """
    device = next(module.parameters()).device
    (target,) = upload_all([labels.softmax(1) if labels.is_floating_point() else labels], device)
    share = None if weights is None else _scale_to_mean_one(weights, len(images)).to(device)
    step = training_step(module, target, share, recipe, precision)
    if device.type != "cuda":
        for epoch, parts in enumerate(epochs(images, recipe, seed, device)):
            for index, x in parts:
                step(index, x, recipe.rate(epoch))
                add_trained(len(x))
            yield epoch
    elif index_device(images) == device:
        yield from _epochs_on_device(step, images, recipe, seed, device, every_epoch)
    else:
        rate = torch.full((), recipe.lr, device=device)
        graph = GraphedStep(lambda index, x: step(index, x, rate))
        for epoch, parts in enumerate(epochs(images, recipe, seed, device)):
            rate.fill_(recipe.rate(epoch))
            for index, x in parts:
                graph(index, x)
                add_trained(len(x))
            yield epoch


def _epochs_on_device(
    step: Step, images: Images, recipe: Recipe, seed: int, device: torch.device, every_epoch: bool
) -> Iterator[int]:
    """Trains on images of a CUDA device by graphs of several steps, which make the batches themselves."""
    count, side = len(images), first_image(images).shape[-1]
    rate = torch.full((), recipe.lr, device=device)
    batches_on_device = DeviceBatches(images, device)

    def run_steps(*sizes: int) -> None:
        for size in sizes:
            step(*batches_on_device.next_batch(size), rate)

    graph, sizes, start = GraphedStep(run_steps, device), batch_sizes(count, recipe.batch), 0
    group = max(1, DEVICE_DRAWS // count)
    if group > STEPS_PER_GRAPH:
        group -= group % STEPS_PER_GRAPH  # leaves no smaller graph at its end
    for needed, draws in draw_epochs(recipe, count, side, seed, group):
        batches_on_device.load(draws)
        for span in _spans(recipe, start, start + needed, every_epoch):
            rate.fill_(recipe.rate(span[0]))
            for part in graph_steps(sizes * len(span)):
                graph(*part)
                add_trained(sum(part))
            yield span[-1]
        start += needed


def _spans(recipe: Recipe, start: int, stop: int, every_epoch: bool) -> Iterator[list[int]]:
    """Cuts epochs into runs of the same learning rate, or into single epochs."""
    for _, epochs in groupby(range(start, stop), lambda epoch: (recipe.rate(epoch), every_epoch and epoch)):
        yield list(epochs)


def training_step(
    module: nn.Module, target: Tensor, share: Tensor | None, recipe: Recipe, precision: torch.dtype
) -> Step:
    """Returns the function that trains `module` in place by one step: (index [B], x [B, C, H, W], lr) -> None.

    target: the labels of all images, int64 [N], or probabilities [N, K]. share: their weights, float32 [N].
    index: rows of target and share. x: the augmented images.
    """
    if target.is_cuda:
        cast(Any, module).to(memory_format=torch.channels_last)  # PyTorch does not declare this argument
    predict, parameters, update = fused_forward(module.train()), tuple(module.parameters()), UPDATES[recipe.optimizer]
    velocity = tuple(map(torch.zeros_like, parameters))

    # A CPU keeps autograd's order of operations, and with it the bits. Plain PyTorch would copy the labels to the CPU.
    needs_loss = not target.is_cuda or implementations()["per_sample"]["cuda"] != "triton"
    if target.is_cuda and precision != torch.float32:
        predict = in_precision(predict, precision)
    # Tensors that recorded graphs read again and again: `scale` without weights, by batch size, and zero gradients.
    scales: dict[int, Tensor] = {}
    zeros: dict[int, Tensor] = {}

    def gradient(x: Tensor, target: Tensor, share: Tensor | None) -> tuple[Tensor, ...]:
        if not needs_loss:
            if share is None and len(x) not in scales:
                scales[len(x)] = torch.full((len(x),), 1 / len(x), device=x.device)
            logits = predict(x)
            upstream = logits_gradient(logits, target, scales[len(x)] if share is None else share / len(x))
            return gradients_or_zeros(logits, parameters, zeros, upstream)
        size = cache_batch_size(module, x[0, 0].numel())
        if len(x) <= size:
            return summed_gradient([batch_loss(predict, x, target, share)], parameters)
        parts = x.split(size), target.split(size), repeat(None) if share is None else share.split(size)
        losses = (batch_loss(predict, *part) * (len(part[0]) / len(x)) for part in zip(*parts, strict=False))
        return summed_gradient(losses, parameters)

    def step(index: Tensor, x: Tensor, lr: float | Tensor) -> None:
        compute = partial(gradient, x, target[index], None if share is None else share[index])
        gradients = gsam_gradient(compute, parameters, recipe.rho, recipe.alpha) if recipe.rho else compute()
        update(parameters, velocity, gradients, lr, recipe.momentum, recipe.weight_decay)

    return step


def in_precision(predict: Callable[[Tensor], Tensor], precision: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Returns `predict` on CUDA with feature maps of this type, from the images to the logits."""

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cuda", precision):
            return predict(x.to(precision))

    return run


def accuracy(module: nn.Module, images: Images, labels: Tensor, batch: int = 1024) -> float:
    """Returns the share of images whose largest logit is that of the label; a row with NaN or +inf counts as wrong.

    The network computes in eval mode. Afterwards each of its layers is in train or eval mode as before.
    Raises UserError if there are no images.
    """
    return int(count_correct(module, images, labels, batch)) / len(images)


@torch.no_grad()
def count_correct(module: nn.Module, images: Images, labels: Tensor, batch: int = 1024) -> Tensor:
    """Returns the number of images that `accuracy` counts as right, as an int64 scalar on the network's device."""
    if not len(images):
        raise UserError("images", 0, "there are none to test the network on; give at least one")
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    batch = min(batch, cache_batch_size(module, first_image(images)[0, 0].numel()))
    index, (target,) = torch.arange(len(images), device=index_device(images)), upload_all([labels], device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with _eval_mode(module):
        body, head = split_wide_head(module)
        predict = fused_forward(body)
        for rows, given in zip(index.split(batch), target.split(batch), strict=True):
            x = predict(images[rows].to(device))
            found = per_sample(x, given) if head is None else per_sample_linear(x, head.weight, given, head.bias)
            correct += (found.prediction == given).sum()
            add_tested(len(rows))
    return correct


def split_wide_head(module: nn.Module) -> tuple[nn.Module, nn.Linear | None]:
    """Splits a last linear layer of WIDE_HEAD classes or more from the network, if nothing observes the layers."""
    if type(module) is not nn.Sequential or len(module) < 2 or has_hooks(module):
        return module, None
    last = module[-1]
    if type(last) is not nn.Linear or last.out_features < WIDE_HEAD or has_hooks(last):
        return module, None
    return module[:-1], last


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a network into eval mode for the block, then gives each layer its own mode back."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training
