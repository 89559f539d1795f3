"""Trains any PyTorch model on noisy labels: an audit decides what a DataLoader draws, and with which label.

It gains the accuracy that wrong labels cost. On scikit-learn's digits with 40 % wrong labels (asymmetric noise), the
same network is trained twice: on the labels as given, and on the trusted view of the audit.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import tadperf
from tadperf import trust
from tadperf.config.merge import merge
from tadperf.data.noise import add_noise


def train(x: Tensor, y: Tensor, weights: Tensor, classes: int, epochs: int) -> nn.Module:
    """Trains a small network with a plain loop. weights: how often a sample is drawn, relative to the others."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(x.shape[1], 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (x.shape[2] // 2) * (x.shape[3] // 2), classes),
    )
    sampler = WeightedRandomSampler(weights.tolist(), len(x))
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(epochs):
        for images, labels in DataLoader(TensorDataset(x, y), batch_size=64, sampler=sampler):
            optimiser.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimiser.step()
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer epochs and rounds")
    epochs, rounds = (10, 1) if parser.parse_args().quick else (30, 3)
    clean, test = tadperf.open_data("digits")
    assert test is not None
    data = add_noise(clean, "asymmetric:0.4", seed=0)  # your data come with their own noise

    config = merge("digits", options={"trust.rounds": rounds})
    view = trust.audit(data, config).view()  # index, labels and weights of the samples to learn from

    x, x_test = data.images.float() / 255, test.images.float() / 255
    runs = {
        "labels as given": (x, data.labels, torch.ones(len(x))),
        "trusted view": (x[view.index], view.labels, view.weights),
    }
    for name, (images, labels, weights) in runs.items():
        net = train(images, labels, weights, data.num_classes, epochs)
        with torch.no_grad():
            right = (net(x_test).argmax(1) == test.labels).float().mean().item()
        print(f"{name:<15} {len(images):4} samples, test accuracy {right:.1%}")


if __name__ == "__main__":
    main()
