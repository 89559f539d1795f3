"""Training the UNet: it learns, follows the weights, and gives the same bits after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tadperf.config import Config, DiffusionConfig, RefineConfig
from tadperf.progress import silent
from tadperf.refine.models import train, unet
from tadperf.refine.models.base import Target, generate
from tadperf.refine.models.open import open_model
from tadperf.run.folder import Run

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TINY = DiffusionConfig(width=8, iterations=6, batch=8, ema=0.5)


def stripes() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns uint8 images of two classes (bright rows, bright columns) and their labels."""
    labels = torch.arange(40) % 2
    rows = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    rows[:, :, ::2] = 230
    return torch.where(labels[:, None, None, None] == 0, rows, rows.transpose(2, 3)), labels


def trained(place: Path, config: DiffusionConfig = TINY, weights=None, progress=silent, resume=False) -> Path:
    images, labels = stripes()
    with Run.create(place, Config(device="cpu"), resume) as run:
        (place / "checkpoints").mkdir(exist_ok=True)
        target = Target((1, 8, 8), ("rows", "columns"), CPU)
        train.train_diffusion_model(
            place / "diffusion",
            train.PixelSamples(lambda index: images[index], labels, weights),
            target,
            config,
            0,
            run,
            progress,
        )
    return place / "diffusion"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_killed_training_ends_in_the_same_bytes(tmp_path, monkeypatch):
    expected = contents(trained(tmp_path / "undisturbed"))
    assert sorted(expected) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    monkeypatch.setattr(train, "SAVE_EVERY", 0.0)

    def stop(stage: str, done: int, total: int, **_: object) -> None:
        if done in (3, 5):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "run", progress=stop, resume=(tmp_path / "run").exists())
    (tmp_path / "run" / "diffusion.partial").mkdir()  # like after a kill in the middle of saving
    assert contents(trained(tmp_path / "run", resume=True)) == expected
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert contents(trained(tmp_path / "run", resume=True)) == expected  # finished: nothing is trained again


def test_the_unet_learns_its_classes(tmp_path):
    config = TINY.model_copy(update={"iterations": 100, "batch": 16, "lr": 5e-3, "ema": 0.9})
    folder = trained(tmp_path / "run", config)
    refine = RefineConfig(source=str(folder), steps=8)
    model = open_model(refine, Target((1, 8, 8), ("rows", "columns"), CPU))
    labels = torch.arange(8) % 2
    images = generate(model, torch.zeros(8, 1, 8, 8), labels, list(range(8)), 1.0, 8)
    expected = stripes()[0][labels]
    assert (images.float() - expected.float()).abs().mean() < 45  # of 255; the classes are 115 apart
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_samples_are_drawn_in_proportion_to_their_weights(tmp_path, monkeypatch):
    drawn: list[int] = []
    images, labels = stripes()

    def pixels(index: torch.Tensor) -> torch.Tensor:
        drawn.extend(index.tolist())
        return images[index]

    target = Target((1, 8, 8), ("rows", "columns"), CPU)
    state = train.initial_training(target, TINY, 0)
    weights = torch.zeros(40)
    weights[[3, 4]] = torch.tensor([3.0, 1.0])
    config = TINY.model_copy(update={"batch": 64})
    for step in range(10):
        train.train_step(
            state, unet.schedulers()[0], train.PixelSamples(pixels, labels, weights), target, config, 0, step
        )
    assert set(drawn) == {3, 4}
    assert 0.68 < drawn.count(3) / len(drawn) < 0.82


def one_step(weights: torch.Tensor | None, **values: object) -> tuple[float, list[torch.Tensor]]:
    """Returns the loss of the first step and the parameters after it."""
    images, labels = stripes()
    config = TINY.model_copy(update={"batch": 64, "weighting": "loss"} | values)
    target = Target((1, 8, 8), ("rows", "columns"), CPU)
    state = train.initial_training(target, config, 0)
    samples = train.PixelSamples(lambda index: images[index], labels, weights)
    loss = train.train_step(state, unet.schedulers()[0], samples, target, config, 0, 0)
    return loss, [parameter.detach().clone() for parameter in state.model.parameters()]


def test_weights_multiply_the_loss_of_samples_with_a_label():
    without, parameters = one_step(None)
    assert without > 0
    loss, same = one_step(None, weighting="draws")
    assert loss == without
    assert all(map(torch.equal, parameters, same))
    half = torch.full((40,), 0.5)
    assert one_step(half, drop=0.0)[0] == pytest.approx(0.5 * one_step(None, drop=0.0)[0])
    assert 0.5 * without < one_step(half, drop=0.5)[0]
    assert one_step(torch.zeros(40), drop=0.0)[0] == 0.0
    assert one_step(torch.zeros(40), drop=0.5)[0] > 0.0
    one = torch.zeros(40)
    one[3] = 1.0
    assert 0 < one_step(one, drop=0.0)[0] < 0.2 * without  # 1 of 40 samples


def test_the_learning_rate_rises_and_falls():
    config = TINY.model_copy(update={"iterations": 1000, "lr": 1.0})
    rates = [train.learning_rate(config, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1, abs=0.03)
    assert rates.index(max(rates)) == train.WARMUP - 1
    assert rates[-1] < 1e-4
