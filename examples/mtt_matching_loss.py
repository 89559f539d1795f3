"""The loss of trajectory matching, as in MTT's scripts and with one operator.

MTT's scripts keep the parameters of student, target and start as flat vectors and divide two sums of squares. This
program runs both versions in turns, forward and backward, with the number of parameters of MTT's ConvNet for CIFAR-10,
for one student and for 16 at once. It checks that values and gradients agree, and prints the times. For 16 students the
operator is faster; for one it is slower, because a call that keeps a gradient has a fixed cost.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import tadperf.kernels as tk

PARAMETERS = 320_010  # ConvNet, width 128, depth 3, 10 classes


def before(student: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """The published code: two sums of squares, each divided by the number of parameters, and their ratio."""
    distance, expert_distance = (F.mse_loss(x, target, reduction="none").sum(-1) / PARAMETERS for x in (student, start))
    return (distance / expert_distance).mean()


def after(student: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """The same with one operator, which reads the vectors once."""
    return tk.trajectory_distance(student, target, start).ratio.mean()


def measure(students: int, turns: int) -> str:
    """Runs both versions in turns, checks that they agree, and returns a line about the gain."""
    torch.manual_seed(0)
    start = 0.05 * torch.randn(students, PARAMETERS)
    target = start + 0.02 * torch.randn_like(start)
    student = (start + 0.02 * torch.randn_like(start)).requires_grad_()
    seconds: dict[str, list[float]] = {"before": [], "after": []}
    values, gradients = {}, {}
    for _ in range(turns):
        for name, loss in (("before", before), ("after", after)):
            begun = time.perf_counter()
            values[name] = loss(student, target, start)
            (gradients[name],) = torch.autograd.grad(values[name], student)
            seconds[name].append(time.perf_counter() - begun)
    torch.testing.assert_close(values["after"], values["before"], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients["after"], gradients["before"], rtol=1e-4, atol=1e-12)
    old, new = (min(seconds[name]) * 1e3 for name in ("before", "after"))
    return f"{students:2} x {PARAMETERS}: before {old:.2f} ms, after {new:.2f} ms, before / after {old / new:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 turns instead of 100")
    options = parser.parse_args()
    for students in (1, 16):
        print(measure(students, 3 if options.quick else 100))


if __name__ == "__main__":
    main()
