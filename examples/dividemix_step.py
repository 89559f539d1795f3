"""DivideMix's split of the training samples into clean and noisy ones, as in its scripts and with two operators.

After every epoch DivideMix takes the loss of each training sample and fits a mixture of two Gaussians to the losses.
This example fits one mixture for each class. `python examples/dividemix_step.py` runs both versions in turns on the
same logits and prints the gain. A small network gives the logits after 20 epochs on scikit-learn's digits, with 30 % of
the labels drawn at random. They are repeated, with a little noise, up to the size of CIFAR-10.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torch import Tensor

import tadperf.kernels as tk


def trained_logits(samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits [N, 10] of a network in training, the given labels [N], and a mask of the clean ones [N]."""
    torch.manual_seed(0)
    digits = load_digits()
    x, truth = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    labels = torch.where(torch.rand(len(truth)) < 0.3, torch.randint(10, truth.shape), truth)
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(net(x[batch]), labels[batch]).backward()
            optimiser.step()
    copies = torch.arange(samples) % len(x)
    with torch.no_grad():
        logits = net(x)[copies]
    return logits + 0.1 * torch.randn_like(logits), labels[copies], (labels == truth)[copies]


def before(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns P(clean) [N] as published: for each class, scales the losses to 0..1 and fits scikit-learn's mixture."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    clean = torch.empty_like(losses)
    for label in range(logits.shape[1]):
        members = (labels == label).nonzero().squeeze(1)
        x = losses[members]
        x = ((x - x.min()) / (x.max() - x.min())).unsqueeze(1).numpy()
        fitted = GaussianMixture(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(x)
        clean[members] = torch.from_numpy(fitted.predict_proba(x)[:, fitted.means_.argmin()]).float()
    return clean


def after(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the same by two operators, at convergence. `floor`, a share of the class variance, replaces reg_covar."""
    return tk.mixture(tk.per_sample(logits, labels).loss, labels, logits.shape[1], floor=1e-2).posterior


def accuracy(clean: Tensor, truth: Tensor) -> float:
    """Returns the share of samples that are correctly called clean or wrong."""
    return ((clean > 0.5) == truth).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5000 samples instead of 50 000")
    options = parser.parse_args()
    logits, labels, truth = trained_logits(5000 if options.quick else 50_000)
    seconds: dict[str, list[float]] = {"before": [], "after": []}
    results = {}
    for _ in range(3):
        for name, step in (("before", before), ("after", after)):
            start = time.perf_counter()
            results[name] = step(logits, labels)
            seconds[name].append(time.perf_counter() - start)
    fastest = {name: min(values) * 1e3 for name, values in seconds.items()}
    for name in fastest:
        share = accuracy(results[name], truth)
        print(f"{name:<6}  {fastest[name]:9.2f} ms  {share:.1%} of the labels correctly called clean or wrong")
    same = ((results["before"] > 0.5) == (results["after"] > 0.5)).float().mean().item()
    print(f"{fastest['before'] / fastest['after']:.0f} times faster; both agree on {same:.1%} of the samples")


if __name__ == "__main__":
    main()
