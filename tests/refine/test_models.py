"""Diffusion models behind one interface: what all guarantee, and what each refuses."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tadperf.config import DiffusionConfig, RefineConfig
from tadperf.errors import UserError
from tadperf.refine.models import sampling, unet
from tadperf.refine.models.base import DiffusionModel, Target, generate, model_kind
from tadperf.refine.models.open import open_model

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE, NAMES = (3, 8, 8), ("ant", "bee", "cat")
TARGET = Target(SHAPE, NAMES, torch.device("cpu"))
TINY = DiffusionConfig(width=8)
KINDS = ["unet", "dit", "stable"]


def config(**values: Any) -> RefineConfig:
    given: dict[str, Any] = {"steps": 4} | values
    return RefineConfig(**given)


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("checkpoints") / "unet"
    unet.save(place, unet.build(TINY, SHAPE, 3, 0), unet.schedulers()[1])
    return place


@pytest.fixture
def folder(request) -> Path:
    return request.getfixturevalue(f"{request.param}_folder")


@lru_cache
def opened(folder: Path, guidance: float = 2.0, shape: tuple = SHAPE) -> DiffusionModel:
    return open_model(config(source=str(folder), guidance=guidance), TARGET._replace(shape=shape))


def images(count: int = 5, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, 8, 8), dtype=torch.uint8, generator=generator)


def starts(model: DiffusionModel, count: int = 5) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    return model.encode(images(count)), torch.arange(count) % 3, [11 * i for i in range(count)]


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_an_image_depends_on_its_own_prototype_label_and_seed(folder):
    model = opened(folder)
    prototypes, labels, image_seeds = starts(model)
    generated = generate(model, prototypes, labels, image_seeds, 0.75, 4)
    assert (generated.dtype, tuple(generated.shape)) == (torch.uint8, (5, *SHAPE))
    order = [3, 0, 4, 2, 1]
    turned = generate(model, prototypes[order], labels[order], [image_seeds[i] for i in order], 0.75, 4)
    assert torch.equal(turned, generated[order])
    for batch in (1, 2, 3, 64):  # the order of sums differs, so a value may round differently
        other = generate(model, prototypes, labels, image_seeds, 0.75, batch)
        assert (other.int() - generated.int()).abs().max() <= 1

    def changed(at: int, **other) -> list[bool]:
        values = {"prototypes": prototypes.clone(), "labels": labels.clone(), "image_seeds": list(image_seeds)}
        for name, value in other.items():
            values[name][at] = value
        return (generate(model, strength=0.75, batch=4, **values) != generated).flatten(1).any(1).tolist()

    for change in ({"image_seeds": 5}, {"labels": 2}, {"prototypes": -prototypes[1]}):
        assert changed(1, **change) == [False, True, False, False, False]


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_strength_and_guidance_reach_the_model(folder):
    prototypes, labels, image_seeds = starts(opened(folder))
    settings = ((2.0, 0.75), (1.0, 0.75), (2.0, 0.25))
    generated = [generate(opened(folder, guidance), prototypes, labels, image_seeds, s, 5) for guidance, s in settings]
    assert not torch.equal(generated[0], generated[1])
    assert not torch.equal(generated[0], generated[2])


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_images_of_another_size_and_progress(folder):
    model = opened(folder, shape=(3, 6, 6))
    given = torch.nn.functional.interpolate(images(5).float(), 6).to(torch.uint8)
    seen = []
    generated = generate(
        model,
        model.encode(given),
        torch.tensor([0, 1, 2, 0, 1]),
        list(range(5)),
        0.75,
        2,
        lambda stage, done, total, **_: seen.append((stage, done, total)),
    )
    assert tuple(generated.shape) == (5, 3, 6, 6)
    assert seen == [("generate", done, 5) for done in (0, 2, 4, 5)]


def test_inductor_gives_the_same_images_up_to_rounding(tmp_path):
    """Compiles once for all strengths: time steps are tensors and batches are padded."""
    from torch._dynamo.utils import counters

    target = TARGET._replace(shape=(3, 4, 4))  # a UNet of one level
    unet.save(tmp_path / "unet", unet.build(TINY, target.shape, 3, 0), unet.schedulers()[1])
    eager, compiled = (
        open_model(config(source=str(tmp_path / "unet"), backend=backend, batch=4), target)
        for backend in ("eager", "inductor")
    )
    prototypes, labels, image_seeds = eager.encode(images()[..., :4, :4]), torch.arange(5) % 3, list(range(5))
    counters.clear()
    for strength in (0.75, 0.5):
        generated = [generate(model, prototypes, labels, image_seeds, strength, 4) for model in (eager, compiled)]
        assert (generated[0].int() - generated[1].int()).abs().max() <= 1
        assert generated[0].float().std() > 1
    assert counters["stats"]["unique_graphs"] == 1


def test_auto_uses_the_expected_number_of_batches(unet_folder, caplog):
    with caplog.at_level("INFO", logger="tadperf.compute.compile"):
        for batches in (None, 3):
            model = open_model(config(source=str(unet_folder)), TARGET._replace(batches=batches))
            generate(model, *starts(model), 0.75, 4)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["UNet2DModel runs eager"] * 2
    assert "the number of calls is not known" in caplog.records[0].getMessage()
    assert "6 calls would save" in caplog.records[1].getMessage()  # of 4 steps, strength 0.7 leaves 2


@pytest.mark.parametrize("folder", ["dit", "stable"], indirect=True)
def test_grey_images_pass_through_a_colour_model(folder):
    model = opened(folder, shape=(1, 8, 8))
    grey = images(2, 1)
    latents = model.encode(grey)
    assert torch.equal(latents, model.encode(grey.expand(-1, 3, -1, -1)))
    assert tuple(generate(model, latents, torch.tensor([0, 1]), [0, 1], 0.75, 2).shape) == (2, 1, 8, 8)


def test_the_dit_loop_equals_the_pipelines_loop(dit_folder, tmp_path, monkeypatch):
    """From pure noise, our loop gives the images of diffusers' loop, which has 1000 classes and no prototypes."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    pipe = DiTPipeline.from_pretrained(dit_folder)
    torch.manual_seed(0)
    transformer: Any = DiTTransformer2DModel.from_config({**pipe.transformer.config, "num_embeds_ada_norm": 1000})
    DiTPipeline(transformer, pipe.vae, pipe.scheduler).save_pretrained(tmp_path)
    pipe: Any = DiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    drawn = sampling.generators([7, 8, 9])
    theirs = pipe([5, 900, 17], 3.0, generator=drawn, num_inference_steps=4, output_type="np").images
    theirs = torch.from_numpy(theirs * 255).round().int().permute(0, 3, 1, 2)
    monkeypatch.setattr(DDIMScheduler, "add_noise", lambda self, start, noise, timestep: noise)
    settings = config(source=str(tmp_path), guidance=3.0, classes=(5, 17, 900))
    ours = generate(open_model(settings, TARGET), torch.zeros(3, 4, 4, 4), torch.tensor([0, 2, 1]), [7, 8, 9], 1.0, 3)
    assert (ours.int() - theirs).abs().max() <= 1
    assert ours.float().std() > 1


def test_encoding_can_be_undone(unet_folder):
    model = opened(unet_folder)
    assert torch.equal(sampling.to_pixels(model.encode(images()), SHAPE), images())
    padded = unet.pad(sampling.to_range(images(), 3, 8), 13)
    assert torch.equal(sampling.to_pixels(unet.crop(padded, 8, 8), SHAPE), images())
    assert (padded.amin(), padded.amax()) == (sampling.to_range(images(), 3, 8).aminmax())


@pytest.mark.parametrize(("side", "padded", "levels"), [(4, 4, 1), (8, 8, 2), (28, 32, 4), (32, 32, 4), (65, 80, 5)])
def test_the_unet_accepts_every_size(side, padded, levels):
    generated = unet.build(TINY, (1, side, side), 2, 0)
    assert (generated.config["sample_size"], len(generated.config["block_out_channels"])) == (padded, levels)
    assert generated(torch.zeros(1, 1, padded, padded), 5, torch.tensor([2])).sample.shape[-1] == padded


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_the_kind_is_read_from_the_folder(folder, request):
    assert model_kind(str(folder)) == request.node.callspec.params["folder"]


def refused(**values) -> str:
    with pytest.raises(UserError) as caught:
        open_model(config(**values), TARGET)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_that_cannot_be_used_are_refused(tmp_path, unet_folder, dit_folder, stable_folder):
    assert refused(source=str(tmp_path)).endswith(
        "model_index.json is missing; give a folder saved by diffusers' save_pretrained"
    )
    assert "no such folder" in refused(source=str(tmp_path / "none"))
    assert "no such folder" in refused(source="nowhere")
    (tmp_path / "model_index.json").write_text("[]")
    assert "is not a JSON object" in refused(source=str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert "holds a FluxPipeline; must be one of DDIM, DDPM, StableDiffusion, DiT" in refused(source=str(tmp_path))
    for place in (unet_folder, dit_folder):
        two = TARGET._replace(class_names=("ant", "bee"))
        with pytest.raises(UserError, match="the model has 3 classes, the data have 2; map them with"):
            open_model(config(source=str(place)), two)
        open_model(config(source=str(place), classes=(2, 0)), two)
        assert refused(source=str(place), classes=(0, 1, 3)).startswith("refine.classes: 0, 1, 3: must be 3 numbers")
    with pytest.raises(UserError, match="takes images of 3 x 8 x 8, the data have 1 x 9 x 9"):
        open_model(config(source=str(unet_folder)), TARGET._replace(shape=(1, 9, 9)))
    for place, part, key, words in (
        (stable_folder, "vae", "latent_channels", "cannot be loaded"),
        (dit_folder, "transformer", "in_channels", "cannot be loaded"),
    ):
        broken = tmp_path / place.name
        shutil.copytree(place, broken)
        settings = json.loads((broken / part / "config.json").read_text())
        (broken / part / "config.json").write_text(json.dumps(settings | {key: 3}))
        assert words in refused(source=str(broken))


def test_other_latent_channels_are_refused(tmp_path, stable_folder, dit_folder):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(latent_channels=3, block_out_channels=(4,), norm_num_groups=2)
    for place, words in ((stable_folder, "its VAE has 3 latent channels"), (dit_folder, "its VAE makes 3")):
        copy = tmp_path / place.name
        shutil.copytree(place, copy, ignore=shutil.ignore_patterns("vae"))
        vae.save_pretrained(copy / "vae")
        assert words in refused(source=str(copy))


def test_a_hub_name_without_a_network_connection(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("Could not reach the hub\nand more lines")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    assert refused(source="owner/name") == (
        "refine.source: owner/name: cannot be downloaded (Could not reach the hub); give a local folder that holds "
        "model_index.json, or train"
    )


def test_a_strength_below_one_step_is_refused():
    assert [sampling.num_steps(25, strength) for strength in (0.04, 0.7, 1.0)] == [1, 17, 25]
    with pytest.raises(
        UserError, match=r"^refine.strength: 0.03: is less than one of refine.steps = 25 steps; .* at least 0.04"
    ):
        sampling.num_steps(25, 0.03)
