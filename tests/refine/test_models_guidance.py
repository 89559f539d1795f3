"""Guidance while denoising: its gradient and step, what it changes in the images, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tadperf.config import DiffusionConfig, RefineConfig
from tadperf.config.merge import merge
from tadperf.errors import UserError
from tadperf.refine.checks import check_refine_config
from tadperf.refine.models import guidance, sampling, unet
from tadperf.refine.models.base import DiffusionModel, Target, generate
from tadperf.refine.models.guidance import ClassFeatures, Guide
from tadperf.refine.models.open import open_model
from tadperf.refine.select import diversity

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE, NAMES = (1, 8, 8), ("rows", "columns")
TINY = DiffusionConfig(width=8)


def stripes(count: int = 40) -> tuple[Tensor, Tensor]:
    """Returns uint8 images of two classes (bright rows, bright columns) with noise, and their labels."""
    labels = torch.arange(count) % 2
    rows = torch.zeros(count, *SHAPE)
    rows[:, :, ::2] = 200
    images = torch.where(labels[:, None, None, None] == 0, rows, rows.transpose(2, 3))
    noise = torch.randint(0, 50, images.shape, generator=torch.Generator().manual_seed(1))
    return (images + noise).to(torch.uint8), labels


def model(**values: Any) -> DiffusionModel:
    given: dict[str, Any] = {"steps": 8, "backend": "eager"} | values
    network = unet.build(TINY, SHAPE, 2, 0)
    target = Target(SHAPE, NAMES, torch.device("cpu"), None, stripes())
    return unet.as_diffusion_model(network, unet.schedulers()[1], RefineConfig(**given), target)


def features_of(network: Any, images: Tensor, labels: Tensor, timestep: int = 40) -> Tensor:
    """Returns the middle block's features [N, D] of images that are not noised."""
    with torch.no_grad(), guidance.captured(network.mid_block) as results:
        network(sampling.to_range(images, 1, 8), timestep, torch.full_like(labels, 2))
    return results[0]


def float64_guide(attraction: float, repulsion: float) -> tuple[Any, Guide]:
    """Returns a UNet in float64 and its guide, for images of 4 x 4."""
    network = unet.build(TINY, (1, 4, 4), 2, 0).double().eval()
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(20, 1, 4, 4, generator=generator).double(), torch.arange(20) % 2
    with torch.no_grad(), guidance.captured(network.mid_block) as results:
        network(images, 300, labels)
    trusted = guidance.class_features(results[0], labels, 2)
    return network, Guide(network.mid_block, lambda _: trusted, unet.schedulers()[1], attraction, repulsion)


@pytest.mark.parametrize(("attraction", "repulsion"), [(0.5, 0.0), (0.0, 0.5), (0.25, 0.5)])
def test_the_step_agrees_with_finite_differences(attraction, repulsion):
    network, guide = float64_guide(attraction, repulsion)
    x = 2 * torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(3)).double()
    x[2:] = x[:2] + 0.3 * x[2:]  # pairs that are close enough to repel each other
    labels, timestep, strength = torch.tensor([0, 1, 0, 1]), torch.tensor(300), attraction + repulsion

    def energies(x: Tensor) -> Tensor:
        with torch.no_grad(), guidance.captured(network.mid_block) as results:
            network(x, timestep, labels)
        pull = guidance.attraction_energy(results[0], labels, guide.trusted(timestep))
        push = guidance.repulsion_energy(results[0], labels, guide.trusted(timestep))
        return (attraction * pull + repulsion * push) / strength

    gradient, h = torch.zeros_like(x), 1e-5
    for place in range(x.numel()):
        change = torch.zeros_like(x)
        change.view(-1)[place] = h
        gradient.view(-1)[place] = ((energies(x + change) - energies(x - change)) / (2 * h)).sum()
    assert int((energies(x) > 0.01).sum()) >= 2
    square = gradient.flatten(1).square().sum(1).clamp(min=guidance.TINY)
    step = strength * gradient * (energies(x) / square)[:, None, None, None]

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        return network(x, timestep, labels).sample

    guided = guidance.guided_prediction(guide, predict, x, timestep, labels)
    sigma = (1 - guide.scheduler.alphas_cumprod[300]).sqrt()
    assert not guided.requires_grad
    torch.testing.assert_close((guided - predict(x, timestep).detach()) * sigma, step, rtol=1e-5, atol=1e-8)


def test_energies_by_hand():
    trusted = ClassFeatures(torch.tensor([[0.0, 0.0], [4.0, 0.0]]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]))
    features = torch.tensor([[3.0, 2.0], [0.0, 0.0], [4.0, 0.0], [4.0, 1.0], [4.5, 0.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    # Distances per feature from the own mean: (9 + 1) / 2, 0, 0, 0.25 / 2, 0.25 / 2; beyond the spreads 1 and 0.5.
    assert guidance.attraction_energy(features, labels, trusted).tolist() == [4.0, 0.0, 0.0, 0.0, 0.0]
    # Pairs of class 1 are 0.125, 0.125 and 0.25 apart; two trusted images are 1 apart on average.
    expected = torch.tensor([0.0, 0.0, 0.875, 0.8125, 0.8125])
    torch.testing.assert_close(guidance.repulsion_energy(features, labels, trusted), expected)


def test_trusted_images_have_the_spread_of_their_class():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 5, generator=generator) * torch.tensor([1.0, 2.0, 3.0])[labels, None] + labels[:, None]
    trusted = guidance.class_features(features, labels, 3)
    assert float(trusted.spread.mean()) == pytest.approx(1)
    assert trusted.spread[0] < trusted.spread[1] < trusted.spread[2]
    for label in range(3):
        part = features[labels == label]
        torch.testing.assert_close(trusted.mean[label], part.mean(0))
        distances = ((part - part.mean(0)) / trusted.deviation).square().mean(1)
        assert float(trusted.spread[label]) == pytest.approx(float(distances.mean()))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_shift_moves_the_denoised_estimate_of_every_kind_of_model(kind):
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(10)
    x, prediction, shift = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    timestep = scheduler.timesteps[4]
    shifted = guidance.shift_estimate(prediction, shift, scheduler.alphas_cumprod[timestep], kind)
    before, after = (scheduler.step(p, timestep, x) for p in (prediction, shifted))
    torch.testing.assert_close(after.pred_original_sample, before.pred_original_sample - shift)
    alpha = scheduler.alphas_cumprod[timestep - 100]
    noise = (x - scheduler.alphas_cumprod[timestep].sqrt() * after.pred_original_sample) / (
        1 - scheduler.alphas_cumprod[timestep]
    ).sqrt()
    torch.testing.assert_close(
        after.prev_sample, alpha.sqrt() * after.pred_original_sample + (1 - alpha).sqrt() * noise
    )


def images_from(count: int = 8, batch: int = 8, last_seed: int = 7, strength: float = 0.5, **values: Any) -> Tensor:
    """Returns images of rows and columns. Each starts from one prototype of the other class, with a seed of its own."""
    opened, labels = model(**values), torch.arange(count) % 2
    prototypes = opened.encode(stripes(2)[0].transpose(2, 3))[labels]
    return generate(opened, prototypes, labels, [*range(count - 1), last_seed], strength, batch)


def test_without_an_energy_the_bytes_stay_the_same(monkeypatch):
    plain = images_from()
    assert torch.equal(images_from(attraction=0.0, repulsion=0.0), plain)
    assert not torch.equal(images_from(attraction=1.0), plain)
    for name in ("attraction_energy", "repulsion_energy"):
        energy = getattr(guidance, name)
        monkeypatch.setattr(guidance, name, lambda *values, energy=energy: 0 * energy(*values))
    assert torch.equal(images_from(attraction=1.0, repulsion=1.0), plain)


@pytest.mark.parametrize("classifier_free", [1.0, 2.0])
def test_attraction_moves_features_toward_the_class(classifier_free):
    network, (pictures, classes) = unet.build(TINY, SHAPE, 2, 0).eval(), stripes()
    trusted = guidance.class_features(features_of(network, pictures, classes), classes, 2)

    def distance(**values: Any) -> float:
        labels = torch.arange(8) % 2
        features = features_of(network, images_from(guidance=classifier_free, **values), labels)
        return float(guidance.attraction_energy(features, labels, trusted).mean())

    assert distance(attraction=0.5) < 0.7 * distance()


def test_repulsion_moves_images_of_a_class_apart():
    network, (pictures, classes) = unet.build(TINY, SHAPE, 2, 0).eval(), stripes()
    deviation = guidance.class_features(features_of(network, pictures, classes), classes, 2).deviation

    def distance(repulsion: float) -> float:
        labels = torch.arange(8) % 2
        images = images_from(strength=0.25, repulsion=repulsion)
        return diversity(features_of(network, images, labels) / deviation, labels)

    assert distance(3.0) > 1.05 * distance(0.0)


def test_images_depend_on_their_class_in_the_batch_and_on_no_padding():
    images = images_from(6, repulsion=3.0, strength=0.25)
    assert torch.equal(images_from(6, batch=64, repulsion=3.0, strength=0.25), images)
    other = images_from(6, repulsion=3.0, strength=0.25, last_seed=99)
    changed = (other != images).flatten(1).any(1).tolist()
    assert changed[::2] == [False] * 3  # of the other class
    assert any(changed[1:5:2])
    assert changed[5]


def refused(**values: Any) -> str:
    options = [f"refine.{name}={value}" for name, value in values.items()]
    with pytest.raises(UserError) as caught:
        check_refine_config(merge("digits", None, options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_values_are_refused():
    assert refused(attraction=-1).startswith("refine.attraction: -1: must be at least 0")
    assert refused(repulsion=-0.1).startswith("refine.repulsion: -0.1: must be at least 0")
    for backend in ("inductor", "cudagraphs", "tensorrt"):
        assert refused(attraction=0.5, backend=backend).startswith(f"refine.backend: {backend}: guidance")
    check_refine_config(merge("digits", None, ["refine.repulsion=0.5", "refine.backend=auto"]))
    network = unet.build(TINY, SHAPE, 2, 0)
    network.mid_block = None
    target = Target(SHAPE, NAMES, torch.device("cpu"), None, stripes())
    with pytest.raises(UserError, match="has no middle block"):
        unet.as_diffusion_model(network, unet.schedulers()[1], RefineConfig(attraction=0.5), target)


@pytest.mark.parametrize("kind", ["dit", "stable"])
def test_other_models_are_refused(kind, request):
    folder: Path = request.getfixturevalue(f"{kind}_folder")
    with pytest.raises(UserError, match="only a UNet over pixels can be guided"):
        open_model(RefineConfig(source=str(folder), attraction=0.5), Target((3, 8, 8), NAMES, torch.device("cpu")))
