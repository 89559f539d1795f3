"""The training loop and the accuracy."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

from tadperf import seeds
from tadperf.config import NetConfig
from tadperf.data import augment
from tadperf.kernels.dispatch import call_counts
from tadperf.nets import training
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.nets.training import Recipe, accuracy, fit

pytestmark = pytest.mark.usefixtures("one_thread")
NET = NetConfig(depth=1, width=4)
RECIPE = Recipe(1, 100, 0.1, 0.0, 0.0, "none", decay=False)


def data(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 3


def fresh() -> torch.nn.Module:
    return build(NET, (1, 8, 8), 3, 0)


def weights(module: torch.nn.Module) -> torch.Tensor:
    return FlatNet(module).flatten()


class Linear(torch.nn.Module):
    """Softmax regression: its gradient is known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight.t()


def test_steps_equal_those_computed_by_hand():
    """Two full-batch steps of softmax regression, momentum and weight decay, in float64."""
    images, labels = data()
    x, y = images.flatten(1).double(), F.one_hot(labels, 3).double()
    weight, velocity = torch.zeros(3, 64, dtype=torch.float64), torch.zeros(3, 64, dtype=torch.float64)
    for _ in range(2):
        gradient = ((x @ weight.t()).softmax(1) - y).t() @ x / len(x) + 0.01 * weight
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.3 * velocity
    module = fit(Linear(), images, labels, Recipe(2, 100, 0.3, 0.9, 0.01, "none", decay=False), 0)
    torch.testing.assert_close(weights(module).view(3, 64).double(), weight, rtol=1e-5, atol=1e-6)
    assert not module.training


def test_the_learning_rate_is_divided_by_ten_after_half_of_the_epochs():
    images, labels = data()
    lengths: list[float] = []
    module, last = Linear(), [torch.zeros(192)]

    def after(epoch: int) -> None:
        now = weights(module)
        x, w = images.flatten(1), last[0].view(3, 64)
        gradient = ((x @ w.t()).softmax(1) - F.one_hot(labels, 3)).t() @ x / len(x)
        lengths.append(float((now - last[0]).norm() / gradient.norm()))
        last[0] = now

    fit(module, images, labels, RECIPE._replace(epochs=10, lr=0.05, decay=True), 0, after)
    assert lengths == pytest.approx([0.05] * 6 + [0.005] * 4, rel=1e-3)  # from epochs // 2 + 1 on, as in MTT's code
    lengths.clear()
    module, last = Linear(), [torch.zeros(192)]
    fit(module, images, labels, RECIPE._replace(epochs=10, lr=0.05), 0, after)
    assert lengths == pytest.approx([0.05] * 10, rel=1e-3)


def test_confident_soft_labels_equal_hard_labels():
    images, labels = data()
    hard, soft = (fit(fresh(), images, y, RECIPE, 0) for y in (labels, 100.0 * F.one_hot(labels, 3)))
    torch.testing.assert_close(weights(soft), weights(hard), rtol=1e-5, atol=1e-6)
    unsure = fit(fresh(), images, 0.1 * F.one_hot(labels, 3), RECIPE, 0)
    assert (weights(unsure) - weights(hard)).norm() > 1e-3


def test_equal_weights_change_nothing_and_weight_0_ignores_an_image():
    images, labels = data()
    recipe = RECIPE._replace(epochs=3, batch=5)
    unweighted = weights(fit(fresh(), images, labels, recipe, 0))
    for equal in (torch.ones(12), torch.full((12,), 7.5, dtype=torch.float64)):
        weighted = weights(fit(fresh(), images, labels, recipe, 0, weights=equal))
        torch.testing.assert_close(weighted, unweighted, rtol=1e-5, atol=1e-6)
    used = torch.arange(12) % 2
    weighted = weights(fit(fresh(), images, labels, RECIPE, 0, weights=used.float()))
    subset = weights(fit(fresh(), images[used > 0], labels[used > 0], RECIPE, 0))
    torch.testing.assert_close(weighted, subset, rtol=1e-5, atol=1e-6)
    assert (subset - weights(fit(fresh(), images, labels, RECIPE, 0))).norm() > 1e-3


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_weighted_steps_equal_those_computed_by_hand(soft):
    """Softmax regression in float64. Each sample is multiplied by its weight over the mean of all weights."""
    images, labels = data()
    counts = torch.rand(12, generator=torch.Generator().manual_seed(3)) + 0.1
    logits = torch.randn(12, 3, generator=torch.Generator().manual_seed(4))
    x, y = images.flatten(1).double(), logits.double().softmax(1) if soft else F.one_hot(labels, 3).double()
    share, weight = (counts.double() / counts.double().mean())[:, None], torch.zeros(3, 64, dtype=torch.float64)
    for index in torch.randperm(12, generator=seeds.generator(0, "epoch", 0)).split(5):
        gap = share[index] * ((x[index] @ weight.t()).softmax(1) - y[index])
        weight = weight - 0.1 * gap.t() @ x[index] / len(index)
    module = fit(Linear(), images, logits if soft else labels, RECIPE._replace(batch=5), 0, weights=counts)
    torch.testing.assert_close(weights(module).view(3, 64).double(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(11), "weights: torch.float32 [11]: must be floating point of shape [12], one per image"),
        (torch.ones(12, 1), "weights: torch.float32 [12, 1]: must be floating point of shape [12], one per image"),
        (
            torch.ones(12, dtype=torch.int64),
            "weights: torch.int64 [12]: must be floating point of shape [12], one per image",
        ),
        (-torch.ones(12), "must be finite and not negative, and not all may be 0"),
        (torch.zeros(12), "must be finite and not negative, and not all may be 0"),
        (torch.full((12,), math.nan), "must be finite and not negative, and not all may be 0"),
    ],
)
def test_wrong_weights_are_refused(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(fresh(), *data(), RECIPE, 0, weights=wrong)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_gradient_of_the_logits_equals_that_of_autograd(soft, classes, weighted):
    generator = torch.Generator().manual_seed(classes)
    logits = 5 * torch.randn(6, classes, generator=generator)
    target = logits.flip(0).softmax(1) if soft else torch.randint(classes, (6,), generator=generator)
    counts = torch.rand(6, generator=generator) if weighted else None
    exact = logits.double().requires_grad_()
    truth = target.double() if soft else target
    loss = training.batch_loss(lambda x: x, exact, truth, None if counts is None else counts.double())
    (expected,) = torch.autograd.grad(loss, exact)
    before = logits.clone()
    scale = torch.full((6,), 1 / 6) if counts is None else counts / 6
    gradient = training.logits_gradient(logits, target, scale)
    assert torch.equal(logits, before)
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-5, atol=1e-7)


def test_gsam_makes_the_minimum_flatter():
    """Compares the mean rise of the loss near the trained weights, with and without GSAM."""
    images, labels = data(60)
    images = images + 2 * torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))[labels]
    rises = {}
    for rho in (0.0, 1.0):
        recipe = Recipe(30, 20, 0.1, 0.0, 0.0, "none", decay=False, rho=rho)
        module = fit(fresh(), images, labels, recipe, 0)
        net, generator = FlatNet(module), torch.Generator().manual_seed(6)
        theta = net.flatten()
        with torch.no_grad():
            low = F.cross_entropy(net(theta, images), labels)
            noise = 0.1 * torch.randn(20, len(theta), generator=generator) * theta.abs()
            rises[rho] = float(sum(F.cross_entropy(net(theta + n, images), labels) - low for n in noise))
        assert low < 0.1
    assert rises[1.0] < 0.8 * rises[0.0]


def test_the_bits_depend_on_the_seed_alone():
    images, labels = data()
    recipe = Recipe(3, 5, 0.1, 0.9, 0.0, "color_crop_cutout_flip_scale_rotate")
    one = weights(fit(fresh(), images, labels, recipe, 4))
    torch.randn(17)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(weights(fit(fresh(), images, labels, recipe, 4)), one)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(weights(fit(fresh(), images, labels, recipe, 5)), one)
    finished: list[int] = []
    fit(fresh(), images, labels, recipe, 4, finished.append)
    assert finished == [0, 1, 2]


def test_an_epoch_uses_every_image_once():
    images, labels = data()

    class Recorder:
        """Images that record which indices are read."""

        indices: tuple[int, ...] = ()

        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
            self.indices += tuple(index.tolist())
            return images[index]

    recorder = Recorder()
    fit(fresh(), recorder, labels, RECIPE._replace(epochs=2, batch=5), 0)
    first, second = recorder.indices[1:13], recorder.indices[13:]  # the first read only gets the image size
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


@pytest.mark.parametrize("count", [7, 100])
def test_grouped_draws_give_the_images_of_single_draws(count, monkeypatch):
    """Compares with one draw per epoch and one call per batch, for three values of DRAW_CHUNK."""
    images, _ = data(count)
    recipe = Recipe(5, 6, 0.1, 0.0, 0.0, "color_crop_cutout_flip_scale_rotate")
    by_chunk = {}
    for chunk in (1, 3000, 1 << 19):
        monkeypatch.setattr(training, "DRAW_CHUNK", chunk)
        passes = training.epochs(images, recipe, 3, torch.device("cpu"))
        by_chunk[chunk] = [[(index.clone(), x.clone()) for index, x in parts] for parts in passes]
    for epoch in range(5):
        generator = seeds.generator(3, "epoch", epoch)
        order = torch.randperm(count, generator=generator)
        drawn = augment.draw(recipe.augment, count, 8, generator)
        for b, start in enumerate(range(0, count, 6)):
            index = order[start : start + 6]
            x = augment.apply(images[index], drawn.rows(start, start + 6))
            for parts in by_chunk.values():
                assert torch.equal(parts[epoch][b][0], index)
                torch.testing.assert_close(parts[epoch][b][1], x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rho", [0.0, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_in_parts_gives_the_result_of_the_whole_batch(rho, weighted, monkeypatch):
    """With momentum, soft labels and weights. Compares parts of three images with a batch of eight."""
    images, _ = data(20)
    labels = torch.randn(20, 3, generator=torch.Generator().manual_seed(8))
    counts = torch.arange(20.0) if weighted else None
    recipe = Recipe(3, 8, 0.1, 0.9, 5e-4, "color_crop_flip", rho=rho)
    expected = weights(fit(fresh(), images, labels, recipe, 0, weights=counts))
    monkeypatch.setattr(training, "CACHE_ACTIVATIONS", 3 * 4 * 64)
    assert training.cache_batch_size(fresh(), 64) == 3
    torch.testing.assert_close(weights(fit(fresh(), images, labels, recipe, 0, weights=counts)), expected)
    running = build(NetConfig.model_validate({"depth": 1, "width": 4, "norm": "batch"}), (1, 8, 8), 3, 0)
    assert training.cache_batch_size(running, 64) > 1000  # batch norm needs the whole batch


def test_an_epoch_does_not_depend_on_how_many_follow():
    """All bits are equal, also if many epochs share one call to `augment.draw`."""
    images, labels = data(13)
    long = Recipe(9, 4, 0.05, 0.9, 5e-4, "color_crop_cutout_flip_scale_rotate", decay=False)
    snapshots: list[torch.Tensor] = []
    module = fresh()
    fit(module, images, labels, long, 4, lambda _: snapshots.append(weights(module)))
    for epochs in (1, 2, 5):
        assert torch.equal(
            weights(fit(fresh(), images, labels, long._replace(epochs=epochs), 4)), snapshots[epochs - 1]
        )


def test_accuracy_counts_nan_as_wrong():
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parameter = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, 0, 0]

    logits = torch.tensor([[3.0, 1, 2], [0, 5, 1], [1, 2, 0], [math.nan] * 3, [math.nan, 1, 0], [0, 0, math.inf]])
    images = logits[:, None, None]  # rows 0 and 1 are right; a row with NaN or +inf counts as wrong
    labels = torch.tensor([0, 1, 0, 0, 1, 2])
    for batch in (1, 4, 1024):
        assert accuracy(Logits(), images, labels, batch) == pytest.approx(2 / 6)


def wide_net(classes: int) -> torch.nn.Sequential:
    module = build(NET, (1, 8, 8), classes, 0)
    assert isinstance(module, torch.nn.Sequential)
    return module


@pytest.mark.parametrize("labelled", [True, False])
def test_a_wide_head_is_tested_without_logits(labelled: bool):
    module = wide_net(training.WIDE_HEAD)
    images = data(50)[0]
    logits = module.eval()(images).double()
    labels = logits.argmax(1) if labelled else torch.arange(50)
    labels[::3] = 0
    before = call_counts()["per_sample_linear", "native"]
    assert accuracy(module, images, labels, 16) == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert call_counts()["per_sample_linear", "native"] - before == 4  # batches


def test_a_head_is_split_only_if_nobody_sees_it():
    assert training.split_wide_head(wide_net(10))[1] is None
    module = wide_net(training.WIDE_HEAD)
    body, head = training.split_wide_head(module)
    assert head is module[-1]
    assert len(list(body.children())) == len(module) - 1
    module[-1].register_forward_hook(lambda *_: None)
    assert training.split_wide_head(module)[1] is None
