"""DivideMix's split of the training samples into clean and noisy ones, as in its scripts and with two operators.

After every epoch DivideMix fits a mixture of two Gaussians to the losses of the training samples; here, one for each
class. Both versions run in turns on the same logits, and the gain in time is printed. `trust.partition` then adds a
threshold per class. The logits are those of a small network after 20 epochs on scikit-learn's digits, with 30 % of the
labels drawn at random, repeated with a little noise up to the size of CIFAR-10.
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
from tadperf import trust


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
    logits = net(x).detach()[copies]
    return logits + 0.1 * torch.randn_like(logits), labels[copies], (labels == truth)[copies]


def before(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns P(clean) [N] as published: for each class, scales the losses to 0..1 and fits scikit-learn's mixture."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    clean = torch.empty_like(losses)
    for label in range(logits.shape[1]):
        members = (labels == label).nonzero().squeeze(1)
        low, high = losses[members].aminmax()
        x = ((losses[members] - low) / (high - low)).unsqueeze(1).numpy()
        fitted = GaussianMixture(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(x)
        clean[members] = torch.from_numpy(fitted.predict_proba(x)[:, fitted.means_.argmin()]).float()
    return clean


def after(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the same by two operators, at convergence. `floor`, a share of the class variance, replaces reg_covar."""
    return tk.mixture(tk.per_sample(logits, labels).loss, labels, logits.shape[1], floor=1e-2).posterior


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5000 samples instead of 50 000")
    logits, labels, truth = trained_logits(5000 if parser.parse_args().quick else 50_000)
    fastest, clean = {"before": float("inf"), "after": float("inf")}, {}
    for _ in range(3):
        for name, step in (("before", before), ("after", after)):
            start = time.perf_counter()
            clean[name] = step(logits, labels) > 0.5
            fastest[name] = min(fastest[name], (time.perf_counter() - start) * 1e3)
    for name, right in ((name, (called == truth).float().mean()) for name, called in clean.items()):
        print(f"{name:<6}  {fastest[name]:9.2f} ms  {right:.1%} of the labels correctly called clean or wrong")
    same, gain = (clean["before"] == clean["after"]).float().mean(), fastest["before"] / fastest["after"]
    print(f"{gain:.0f} times faster; both agree on {same:.1%} of the samples")
    trusted = trust.partition(tk.per_sample(logits, labels).loss, labels).trusted
    print(f"partition trusts {trusted.float().mean():.1%} of the labels; {truth[trusted].float().mean():.1%} are right")


if __name__ == "__main__":
    main()
