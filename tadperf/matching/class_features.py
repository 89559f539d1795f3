"""The features of a network as a function of its parameters, and their class-wise means over the real samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf import seeds
from tadperf.data import augment
from tadperf.data.images import first_image, index_device
from tadperf.errors import UserError
from tadperf.matching.base import MatchProblem
from tadperf.nets.flat import FlatNet
from tadperf.nets.fused import fused_forward
from tadperf.nets.training import cache_batch_size

KEPT_BYTES = 1 << 30  # of class means of snapshots; older ones are dropped and computed again if drawn; not tuned
BLOCK = 1024  # real images in one forward pass; not tuned


class FeatureNet:
    """Features and logits of a network as pure functions of one parameter vector theta [P].

    Features are the inputs of its last linear layer. fused: uses `fused_forward`, which can be differentiated once.
    Raises UserError if the network is not a Sequential that ends with a linear layer.
    """

    def __init__(self, net: FlatNet, fused: bool) -> None:
        module = net.module
        last = module[-1] if type(module) is nn.Sequential and len(module) > 1 else None
        if not (isinstance(module, nn.Sequential) and isinstance(last, nn.Linear)):
            raise UserError("network", type(module).__name__, "has unknown features; end a Sequential with a Linear")
        self.net, self.body = net, Body(module[:-1], fused)
        self.num_classes, self.width = last.out_features, last.in_features
        self._last, self._biased = list(module._modules)[-1], last.bias is not None

    def features(self, theta: Tensor, x: Tensor) -> Tensor:
        """Returns the features [B, D] of images x [B, C, H, W]."""
        views = self.net.views(theta)
        body = {f"layers.{name}": view for name, view in views.items() if name.split(".")[0] != self._last}
        return torch.func.functional_call(self.body, body, (x,))

    def logits(self, theta: Tensor, features: Tensor) -> Tensor:
        """Returns the logits [B, K] of features [B, D]."""
        views = self.net.views(theta)
        return F.linear(features, views[f"{self._last}.weight"], views[f"{self._last}.bias"] if self._biased else None)


class Body(nn.Module):
    """All layers but the last one. Parameters that replace those of `layers` also act in their fused form."""

    def __init__(self, layers: nn.Module, fused: bool) -> None:
        super().__init__()
        self.layers = layers
        run = fused_forward(layers) if fused else layers
        self._run = (run,)  # in a tuple, because a module in an attribute would be registered a second time

    def forward(self, x: Tensor) -> Tensor:
        return self._run[0](x)


class ClassMeans(NamedTuple):
    """The class-wise weighted means of features [K, D], and the weighted variance of all features, summed over D."""

    means: Tensor
    scatter: Tensor


class RealFeatures:
    """Computes the `ClassMeans` of the real samples under a snapshot, once for each snapshot (tadperf).

    Every sample counts with its weight and its corrected label, under one drawn augmentation. The draws depend on seed,
    expert and epoch alone, so a resumed run and every rank get the same bytes.
    """

    def __init__(self, problem: MatchProblem, net: FeatureNet, device: torch.device) -> None:
        assert problem.real is not None, "feature matching needs the real samples"
        images, labels, weights = problem.real
        self.problem, self.net, self.device, self.images = problem, net, device, images
        self.labels = labels.to(device)
        weights = torch.ones(len(labels)) if weights is None else weights
        self.weights = weights.to(device, torch.float64)
        mass = torch.zeros(net.num_classes, dtype=torch.float64).index_add_(0, labels.cpu(), self.weights.cpu())
        assert bool((mass > 0).all()), "a class has no trusted samples"
        self._most = max(1, KEPT_BYTES // (4 * net.num_classes * net.width))
        self._kept: dict[tuple[int, int], ClassMeans] = {}

    def __call__(self, expert: int, epoch: int, theta: Tensor) -> ClassMeans:
        """theta: the snapshot [P] of this expert after this epoch, on the device."""
        key = (expert, epoch)
        if key not in self._kept:
            while len(self._kept) >= self._most:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._compute(key, theta)
        return self._kept[key]

    @torch.no_grad()
    def _compute(self, key: tuple[int, int], theta: Tensor) -> ClassMeans:
        problem, side = self.problem, first_image(self.images).shape[-1]
        pixels = first_image(self.images)[0, 0].numel()
        block = min(BLOCK, cache_batch_size(problem.net.module, pixels))
        generator = seeds.generator(problem.seed, "real features", *key)
        # Sums in float64: a variance in float32 would lose digits. Rows: weight, sum and sum of squares of each class.
        sums = torch.zeros(self.net.num_classes, self.net.width + 2, dtype=torch.float64, device=self.device)
        for rows in torch.arange(len(self.images), device=index_device(self.images)).split(block):
            drawn = augment.draw(problem.augment, len(rows), side, generator)
            x = augment.apply(self.images[rows].to(self.device), drawn)
            features = self.net.features(theta, x).double()
            index = rows.to(self.device)
            one_hot = F.one_hot(self.labels[index], self.net.num_classes).double() * self.weights[index, None]
            squares = features.square().sum(1, keepdim=True)
            sums += one_hot.T @ torch.cat([torch.ones_like(squares), squares, features], 1)
        mass, squares, totals = sums.split([1, 1, self.net.width], 1)
        centre = totals.sum(0) / mass.sum()
        scatter = squares.sum() / mass.sum() - centre.square().sum()
        return ClassMeans((totals / mass).to(theta.dtype), scatter.clamp_min(1e-12).to(theta.dtype))
