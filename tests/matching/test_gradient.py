"""Compares the adjoint with the full unroll and with finite differences, and bounds its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tadperf.config import MatchConfig, NetConfig
from tadperf.data import augment
from tadperf.matching import gradient
from tadperf.matching.gradient import (
    GRADIENTS,
    KEPT_VECTORS,
    adjoint,
    scaled_gradients,
    slices_by_pass,
    tesla,
    unroll,
)
from tadperf.matching.trajectories import draw_steps

pytestmark = pytest.mark.usefixtures("one_thread")


def trained_loss(p: Any) -> float:
    """Returns the matching loss of an ordinary training run with backward and torch.optim.SGD."""
    module, net = p.net.module, p.net
    torch.nn.utils.vector_to_parameters(p.start.clone(), module.parameters())
    optimiser = torch.optim.SGD(module.parameters(), float(p.lr))
    for index, drawn in p.steps:
        target = p.labels[index]
        logits = module(augment.apply(p.images[index], drawn))
        loss = F.cross_entropy(logits, target.softmax(1) if target.is_floating_point() else target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    end = net.flatten()
    return float((end - p.target).square().sum() / (p.start - p.target).square().sum())


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class AddedRows(TorchDispatchMode):
    """Collects the rows of each index_add_."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "index_add_":
            self.rows.append(args[2].tolist())
        return func(*args, **(kwargs or {}))


def test_no_image_is_added_twice_in_parallel(problem):
    """On CUDA the order of two additions to one image would change from run to run."""
    p = problem(True)
    count = len(p.images)
    config = MatchConfig(steps=7, batch=count - 1)
    steps = draw_steps(config, count, p.images.shape[-1], "none", torch.Generator().manual_seed(0)).split()
    assert any(len(step.rows.unique()) < len(step.rows) for step in steps)
    with AddedRows() as added:
        adjoint(*p._replace(steps=steps))
    assert all(len(set(rows)) == len(rows) for rows in added.rows)
    assert len(added.rows) == 2 * (7 + 6)  # images and labels; all batches but the first hold the end of a pass


@pytest.mark.parametrize("exact", [True, False], ids=["adjoint", "tesla"])
def test_a_gradient_can_be_scaled_last(problem, exact):
    """The distances of three trajectories in one call, and neither loss in the sweep."""
    p = problem(True, steps=4)
    others = [p, p._replace(target=p.target + 0.1), p._replace(start=p.start * 1.1)]
    expected = [adjoint(*other, exact=exact) for other in others]
    unscaled = [adjoint(*other, exact=exact, scaled=False) for other in others]
    assert all(part.layers is None and float(part.loss) == 0 for part in unscaled)
    sizes = list(p.net.layer_sizes.values())
    found = scaled_gradients(unscaled, [o.start for o in others], [o.target for o in others], sizes)
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "images", "labels", "lr", "layers", "end"):
            assert error(getattr(ours, name), getattr(theirs, name)) < 1e-12, name


def test_batches_are_cut_at_the_ends_of_passes():
    cut = [[(part.start, part.stop) for part in parts] for parts in slices_by_pass([3, 3, 3, 4, 9], 4)]
    assert cut == [[(0, 3)], [(0, 1), (1, 3)], [(0, 2), (2, 3)], [(0, 3), (3, 4)], [(0, 3), (3, 7), (7, 9)]]
    assert slices_by_pass([4, 4], 4) == [[slice(0, 4)], [slice(0, 4)]]


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_adjoint_equals_the_unrolled_gradient(problem, soft):
    p = problem(soft)
    assert torch.cat([step.rows for step in p.steps]).bincount().min() >= 6  # every image is used repeatedly
    assert any(len(step.rows.unique()) < len(step.rows) for step in p.steps)  # some batch holds an image twice
    ours, reference = adjoint(*p), unroll(*p)
    assert float(ours.loss) == pytest.approx(float(reference.loss), rel=1e-12)
    assert float(ours.loss) == pytest.approx(trained_loss(p), rel=1e-10)
    assert error(ours.end, reference.end) < 1e-12
    assert error(ours.images, reference.images) < 1e-8
    assert error(ours.lr, reference.lr) < 1e-8
    if soft:
        assert ours.labels is not None
        assert reference.labels is not None
        assert error(ours.labels, reference.labels) < 1e-8
    else:
        assert ours.labels is None
        assert reference.labels is None


@pytest.mark.parametrize("method", ["adjoint", "unroll"])
def test_the_gradient_agrees_with_finite_differences_of_a_training_run(problem, method):
    p = problem(soft=True, steps=5)
    gradient = GRADIENTS[method](*p)
    assert gradient.labels is not None

    def slope(name: str, position: tuple[int, ...], step: float = 1e-6) -> float:
        losses = []
        for side in (1, -1):
            value = getattr(p, name).clone()
            value[position] += side * step
            losses.append(trained_loss(p._replace(**{name: value})))
        return (losses[0] - losses[1]) / (2 * step)

    steepest = gradient.images.abs().flatten(1).argmax(1)  # one pixel of each image
    for image in (0, 3, 7):
        pixel = (image, *map(int, torch.unravel_index(steepest[image], gradient.images.shape[1:])))
        assert slope("images", pixel) == pytest.approx(float(gradient.images[pixel]), rel=1e-4)
    assert slope("images", (5, 1, 4, 4)) == pytest.approx(float(gradient.images[5, 1, 4, 4]), rel=1e-3, abs=1e-8)
    for logit in ((0, 0), (6, 3)):
        assert slope("labels", logit) == pytest.approx(float(gradient.labels[logit]), rel=1e-4)
    assert slope("lr", ()) == pytest.approx(float(gradient.lr), rel=1e-4)


def test_tesla_is_exact_only_for_one_step(problem):
    one = problem(soft=True, steps=1)
    for ours, reference in zip(tesla(*one), adjoint(*one), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=0)
    many = problem(lr=0.5)
    assert error(tesla(*many).images, adjoint(*many).images) > 0.01


@pytest.mark.parametrize("name", ["convnet", "resnet18", "alexnet", "vgg11"])
def test_the_adjoint_is_exact_for_every_network(problem, name):
    config = NetConfig(name=name, width=8)
    p = problem(config=config, steps=2, count=2, batch=1)
    ours, reference = adjoint(*p), unroll(*p)
    assert reference.images.norm() > 0
    assert error(ours.images, reference.images) < 1e-8
    assert error(ours.lr, reference.lr) < 1e-8


@pytest.mark.parametrize("norm", ["group", "layer", "none"])
def test_the_adjoint_is_exact_for_every_norm(problem, norm):
    p = problem(config=NetConfig(depth=2, width=6, norm=norm), steps=3)
    assert error(adjoint(*p).images, unroll(*p).images) < 1e-8


def test_arguments_do_not_change_and_no_graph_remains(problem):
    p = problem(soft=True, steps=2)
    before = [value.clone() for value in (p.start, p.target, p.images, p.labels, p.lr)]
    for method in GRADIENTS.values():
        assert not any(value.requires_grad for value in method(*p) if value is not None)
    for value, copy in zip((p.start, p.target, p.images, p.labels, p.lr), before, strict=True):
        assert torch.equal(value, copy)
        assert not value.requires_grad
    assert all(parameter.grad is None for parameter in p.net.module.parameters())


@pytest.mark.parametrize("kept", [1, 3, 4, 9])
def test_recomputed_vectors_have_the_same_bits(problem, monkeypatch, kept):
    p = problem(soft=True, steps=10)
    stored = adjoint(*p)
    monkeypatch.setattr(gradient, "KEPT_VECTORS", kept)
    for value, again in zip(stored, adjoint(*p), strict=True):
        assert value is not None and again is not None and torch.equal(value, again)  # noqa: PT018


MEMORY = """
import sys, torch
from tadperf.config import MatchConfig, NetConfig
from tadperf.matching.gradient import GRADIENTS
from tadperf.matching.trajectories import draw_steps
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.run.stage_meter import process_peak
method, steps, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
net = FlatNet(build(NetConfig(width=128, depth=3), (3, 32, 32), 10, 0))
assert net.num_parameters == 320_010
start = net.flatten()
generator = torch.Generator().manual_seed(0)
strategy = "color_crop_cutout_flip_scale_rotate"
drawn = draw_steps(MatchConfig(steps=steps, batch=batch), 100, 32, strategy, generator).split()
GRADIENTS[method](
    net, start, start + 0.01 * torch.randn_like(start), torch.randn(100, 3, 32, 32),
    torch.arange(10).repeat_interleave(10), torch.tensor(0.01), drawn,
)
print(process_peak())
"""


def peak(method: str, steps: int, batch: int) -> int:
    """Returns the peak resident bytes of a new process at CIFAR-10 shapes, IPC 10."""
    command = [sys.executable, "-c", MEMORY, method, str(steps), str(batch)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # every thread has its own workspace
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def test_memory_grows_only_by_the_stored_parameter_vectors():
    growth = peak("adjoint", 80, 4) - peak("adjoint", 10, 4)
    # 20 vectors of tolerance, because the holes in the heap vary by 20 MB. All 70 vectors would exceed the bound.
    assert growth <= (KEPT_VECTORS - 10 + 20) * 4 * 320_010
    assert growth <= 0.15 * peak("adjoint", 1, 50)  # the peak of one step with the usual batch at IPC 10
