"""A base of your own for matching: distribution matching (DM; Zhao and Bilen, 2023) with the loop of tadperf.

A base computes the gradient of one iteration. The loop does the rest: SGD with momentum, several draws and ranks, the
guard against divergence, checks on held-out samples, checkpoints, resuming and the log. `python
examples/custom_base.py` distils the built-in digits to one image per class. It prints the loss and held-out accuracies.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from tadperf.compute.torch_settings import torch_settings
from tadperf.config.merge import merge
from tadperf.data import augment
from tadperf.matching.base import Base, MatchProblem, draw_generator, image_gradient
from tadperf.matching.class_features import FeatureNet, RealFeatures
from tadperf.matching.gradient import Gradient
from tadperf.matching.state import MatchState
from tadperf.pipeline.context import open_context
from tadperf.pipeline.experts import get_experts
from tadperf.pipeline.matching import match
from tadperf.pipeline.prepare import prepare
from tadperf.progress import silent
from tadperf.run.folder import Run


class DistributionMatching(Base):
    """Matches the mean features of each class under networks with random weights: the experts before training."""

    layers = ("features",)  # the names of the values in the log

    def __init__(self, state: MatchState, problem: MatchProblem) -> None:
        super().__init__(state, problem)
        self.net = FeatureNet(problem.net, fused=True)
        self.real = RealFeatures(problem, self.net, state.images.device)  # by class, with the weights of the samples

    def gradient(self, state: MatchState, number: int) -> Gradient:
        generator = draw_generator(self.problem, state, number)  # everything random comes from it
        expert = int(torch.randint(len(self.problem.experts), (), generator=generator))
        theta = self.problem.experts.snapshot(expert, 0).to(state.images.device)
        means = self.real(expert, 0, theta).means
        pixels = state.images.clone().requires_grad_()
        drawn = augment.draw(self.problem.augment, len(pixels), pixels.shape[-1], generator)
        features = self.net.features(theta, augment.apply(pixels, drawn))
        loss = (features.view(len(means), -1, features.shape[1]).mean(1) - means).square().sum(1).mean()
        (grad,) = torch.autograd.grad(loss, pixels)
        return image_gradient(loss.detach(), grad, layers=loss.detach()[None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="60 iterations instead of 600")
    iterations = 60 if parser.parse_args().quick else 600
    fields = [f"match.iterations={iterations}", f"match.check_every={iterations // 3}", "match.soft_labels=false"]
    fields += ["match.lr_img=10", "match.init=real", "experts.count=20", "experts.epochs=7", "trust.mode=off"]
    task = prepare(merge("digits-ipc1", sets=[*fields, "data.noise=none", "evaluate.epochs=100"]))
    with (
        tempfile.TemporaryDirectory() as folder,
        torch_settings(),
        Run.create(Path(folder) / "run", task.config) as run,
    ):
        (run.path / "checkpoints").mkdir()
        context = open_context(task, run, silent)
        match(context, get_experts(context), make_base=DistributionMatching)
        records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    accuracies = [record["held_out"] for record in records if "held_out" in record]
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    print(f"mean loss of the first ten iterations {first:.3f}, of the last ten {last:.3f}")
    print("held-out accuracy at the checks:", ", ".join(f"{accuracy:.1%}" for accuracy in accuracies))


if __name__ == "__main__":
    main()
