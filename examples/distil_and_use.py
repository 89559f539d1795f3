"""Distils the digits to one image per class, and trains a network of your own on these ten images.

It gains a training set of a few kilobytes: your network sees 10 images instead of 1400 and needs seconds. Everything
that a training loop needs is in one file: images, soft labels, augmentation, normalisation, class names.

The same on the command line: tadperf distill --ipc 1 --noise none --trust off
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tadperf
from tadperf.config.merge import merge
from tadperf.data import augment

LR = 0.02  # not tuned


def distil(folder: str, iterations: int) -> tadperf.DistilledSet:
    """Runs a short job on clean labels. A job of the default size has 150 iterations and 8 experts."""
    options = {
        "match.ipc": 1,
        "match.iterations": iterations,
        "match.check_every": iterations,
        "experts.count": 2,
        "experts.epochs": 8,
        "evaluate.repeats": 1,
        "evaluate.epochs": 50,
        "evaluate.full_repeats": 0,
        "trust.mode": "off",
        "data.noise": "none",
    }
    return tadperf.distill(merge("digits-ipc1", options=options), folder)


def train(net: nn.Module, x: Tensor, y: Tensor, lr: float, strategy: str, epochs: int) -> nn.Module:
    """Trains any network on the images. y: class numbers int64 [M], or label logits [M, K], as in the file."""
    target = y.softmax(1) if y.is_floating_point() else y
    optimiser = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for images, labels in DataLoader(TensorDataset(x, target), batch_size=64, shuffle=True, generator=generator):
            drawn = augment.draw(strategy, len(images), images.shape[-1], generator)
            optimiser.zero_grad()
            F.cross_entropy(net(augment.apply(images, drawn)), labels).backward()
            optimiser.step()
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 iterations instead of 100")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        ds = distil(f"{parent}/run", 20 if options.quick else 100)
    print(ds)
    torch.manual_seed(0)
    pixels = ds.images[0].numel()
    net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, ds.num_classes))
    trained = train(net, ds.images, ds.labels, LR, ds.augment, epochs=300)  # ds.lr suits the network of the file
    print(f"a new perceptron: {ds.accuracy(trained, 'digits'):.1%} of the test digits are right")
    print(f"the network and recipe of the file: {ds.accuracy(ds.train(), 'digits'):.1%}")


if __name__ == "__main__":
    main()
