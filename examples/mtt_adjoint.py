"""The unrolled inner loop of trajectory matching, as in MTT's scripts, and one call that replaces it.

The scripts keep the graph of all T inner steps, so memory grows with T. `tadperf.matching.adjoint` keeps at most 40
weight vectors and the activations of one step, and uses formulas for the second derivatives of a ConvNet.
This program runs both on the same ConvNet, images and augmentations, and checks that the gradients agree.
It prints the processor time of both, and the bytes that autograd stores for the unrolled steps.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tadperf.matching import Step, adjoint, repeatable


def convnet(width: int) -> nn.Module:
    """Returns a ConvNet for 8 x 8 images with the layers of published code: GroupNorm with a group per channel."""
    layers: list[nn.Module] = []
    for channels in (3, width):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, 10))


def before(
    net: nn.Module, start: Tensor, target: Tensor, x: Tensor, y: Tensor, lr: Tensor, steps: list[Step]
) -> Tensor:
    """The published loop: unrolls T steps of SGD, and differentiates the matching loss through all of them."""
    x = x.detach().requires_grad_()
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()), strict=True)
    theta = start.detach().requires_grad_()
    for rows, augment in steps:
        parts = theta.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        loss = F.cross_entropy(functional_call(net, weights, (augment(x[rows]),)), y[rows])
        theta = theta - lr * torch.autograd.grad(loss, theta, create_graph=True)[0]
    loss = (theta - target).square().sum() / (start - target).square().sum()
    return torch.autograd.grad(loss, x)[0]


def after(net: nn.Module, start: Tensor, target: Tensor, x: Tensor, y: Tensor, lr: Tensor, steps: list[Step]) -> Tensor:
    """The same by one call."""
    return adjoint(net, start, target, x, y, lr, steps).images


def main() -> None:
    parser = argparse.ArgumentParser(description="The unrolled inner loop of trajectory matching, and the adjoint.")
    parser.add_argument("--quick", action="store_true", help="5 inner steps instead of 20")
    count = 5 if parser.parse_args().quick else 20
    torch.manual_seed(0)
    net = convnet(32)
    start = nn.utils.parameters_to_vector(net.parameters()).detach()
    target = start + 0.01 * torch.randn_like(start)
    x, y, lr = torch.randn(100, 3, 8, 8), torch.arange(100) % 10, torch.tensor(0.02)
    flip = [repeatable(lambda x: torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)) for _ in range(count)]
    steps = [Step(torch.randperm(100)[:50], augment) for augment in flip]
    stored, gradients = [], {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t.nbytes) or t, lambda t: t):
        before(net, start, target, x, y, lr, steps)
    print(f"autograd stores {sum(stored) / 1e6:.0f} MB for {count} unrolled steps")
    for name, gradient in (("before", before), ("after", after)):
        gradient(net, start, target, x, y, lr, steps)  # the first call is slower
        begun = time.process_time()
        gradients[name] = gradient(net, start, target, x, y, lr, steps)
        print(f"{name:<6}  {(time.process_time() - begun) * 1e3:.0f} ms of processor time")
    torch.testing.assert_close(gradients["after"], gradients["before"], rtol=1e-3, atol=1e-7)
    print("the gradients agree")


if __name__ == "__main__":
    main()
